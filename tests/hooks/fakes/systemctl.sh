#!/bin/sh
# A stand-in for systemctl: a unit is a folder in $FAKE_DIR. Its server is the test's own; it answers while `state` says
# active.

echo "systemctl $*" >>"$FAKE_DIR/calls"
[ "${1:-}" != --user ] || shift
command=$1
shift
for unit; do :; done # the last
box=$FAKE_DIR/$unit

refuse() {
	echo "$1" >&2
	exit "${2:-1}"
}

[ ! -e "$FAKE_DIR/daemon_is_down" ] || refuse "Failed to connect to bus: No such file or directory"

state=inactive
[ ! -e "$box/state" ] || read -r state <"$box/state"
case $command in
show)
	[ "$1 $3" = "--property --value" ] || refuse "unknown option"
	case $2 in
	ActiveState)
		echo "$state"
		if [ "$state" = activating ] && [ -e "$FAKE_DIR/loops" ]; then
			echo $(($(cat "$box/restarts") + 1)) >"$box/restarts"
		elif [ "$state" = activating ]; then
			echo active >"$box/state"
		fi
		;;
	LoadState) if [ -d "$box" ]; then echo loaded; else echo not-found; fi ;;
	NRestarts) cat "$box/restarts" 2>/dev/null || echo 0 ;;
	Result) echo exit-code ;;
	*) refuse "unknown property" ;;
	esac
	;;
start)
	[ -d "$box" ] || refuse "Failed to start $unit: Unit $unit not found." 5
	[ "$state" != failed ] || refuse "Job for $unit failed: start of the service was attempted too often" 1
	[ ! -e "$FAKE_DIR/start_fails" ] || { echo failed >"$box/state" && refuse "Job for $unit failed." 1; }
	cat "$FAKE_DIR/next_start" >"$box/state" 2>/dev/null || echo active >"$box/state"
	;;
stop)
	[ ! -e "$FAKE_DIR/stop_fails" ] || refuse "Failed to stop $unit: Interactive authentication required." 1
	echo inactive >"$box/state"
	;;
kill)
	[ "$1" = --signal=KILL ] || refuse "unknown option"
	echo failed >"$box/state"
	;;
reset-failed) echo inactive >"$box/state" ;;
*) refuse "Unknown command verb $command." ;;
esac
