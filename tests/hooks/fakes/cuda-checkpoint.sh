#!/bin/sh
# A stand-in for cuda-checkpoint: keeps the states of real processes in $FAKE_DIR. Those called python use CUDA.
# Facts: the README of NVIDIA/cuda-checkpoint, driver 570.

echo "cuda-checkpoint $*" >>"$FAKE_DIR/calls"

refuse() {
	echo "$1" >&2
	exit 1
}

action='' timeout=''
while [ $# -gt 0 ]; do
	case $1 in
	--get-state) action=get-state ;;
	--action) action=$2 && shift ;;
	--pid) pid=$2 && shift ;;
	--timeout) timeout=$2 && shift ;;
	*) refuse "unknown option $1" ;;
	esac
	shift
done

kill -0 "$pid" 2>/dev/null || refuse "Could not find process with pid $pid"
read -r comm <"/proc/$pid/comm"
case $comm in
python*) ;;
*) refuse "Error getting process state for process ID $pid: \"OS call failed or operation not supported on this OS\"" ;;
esac

[ ! -e "$FAKE_DIR/hangs" ] || exec sleep 600
file=$FAKE_DIR/$pid
state=running
[ ! -e "$file" ] || read -r state <"$file"
[ -z "$timeout" ] || [ "$action" = lock ] || refuse "--timeout is for lock"
case $state.$action in
*.get-state) echo "$state" ;;
running.lock)
	if [ -e "$FAKE_DIR/busy" ] && [ "$(cat "$FAKE_DIR/busy")" = "$pid" ]; then refuse "lock: operation timed out"; fi
	echo locked >"$file"
	;;
locked.checkpoint)
	if [ -e "$FAKE_DIR/uvm" ]; then
		echo failed >"$file"
		refuse "checkpoint: operation not supported"
	fi
	echo checkpointed >"$file"
	;;
checkpointed.restore) echo locked >"$file" ;;
locked.unlock) echo running >"$file" ;;
*) refuse "Error: cannot $action process ID $pid, which is $state" ;;
esac
