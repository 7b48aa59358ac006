#!/bin/sh
# A stand-in for docker and podman (by its name): keeps containers in $FAKE_DIR, a folder each, and refuses what the
# real ones refuse. A container's server is the test's own; it answers while `status` says running.

engine=${0##*/}
echo "$engine $*" >>"$FAKE_DIR/calls"
echo "WARNING: Error loading config file: open /root/.docker/config.json: permission denied" >&2

refuse() {
	echo "$1" >&2
	exit "${2:-1}"
}

missing() {
	case $engine in
	docker) refuse "Error response from daemon: No such container: $1" ;;
	*) refuse "Error: no container with name or ID \"$1\" found: no such container" 125 ;;
	esac
}

open() { # the container $1 has to be there
	box=$FAKE_DIR/$1
	[ -d "$box" ] || missing "$1"
	read -r status <"$box/status"
}

become() { echo "$1" >"$box/status"; }

begin() { # run, or whatever a test wants
	next=running
	[ ! -e "$FAKE_DIR/next_start" ] || read -r next <"$FAKE_DIR/next_start"
	become "$next"
}

[ ! -e "$FAKE_DIR/daemon_is_down" ] || refuse "$(cat "$FAKE_DIR/daemon_is_down")"
[ ! -e "$FAKE_DIR/daemon_hangs" ] || exec sleep 600

command=$1
shift
case $command in
inspect)
	[ "$1 $2 $3" = "--type container --format" ] || refuse "unknown flag: $*" 125
	box=$FAKE_DIR/$5
	[ -d "$box" ] || case $engine in
	docker) refuse "Error: No such container: $5" ;;
	*) refuse "Error: no such container \"$5\"" 125 ;;
	esac
	case $4 in
	'{{.State.Status}}')
		read -r status <"$box/status"
		if [ "$status" = removing ]; then # seen once more, then gone
			rm -r "$box"
		fi
		echo "$status"
		;;
	'{{.State.Checkpointed}}') if [ -e "$box/checkpoint" ]; then echo true; else echo false; fi ;;
	*) refuse "template: $4" ;;
	esac
	;;
run)
	[ "$1 $2" = "--detach --name" ] || refuse "unknown flag: $*" 125
	box=$FAKE_DIR/$3
	[ ! -d "$box" ] || refuse "Conflict. The container name \"/$3\" is already in use by container \"4f22\"." 125
	mkdir "$box"
	shift 3
	printf '%s\n' "$@" >"$box/arguments"
	begin
	echo 4f22
	;;
start)
	open "$1"
	case $status in
	paused) refuse "Error response from daemon: cannot start a paused container, try unpause instead" ;;
	removing) refuse "Error response from daemon: container is marked for removal and cannot be started" ;;
	esac
	rm -f "$box/checkpoint"
	begin
	echo "$1"
	;;
stop)
	[ "$1" = -t ] || refuse "unknown flag: $*" 125
	open "$3"
	[ "$status" != paused ] || refuse "cannot stop: container is paused"
	[ ! -e "$FAKE_DIR/stop_fails" ] || refuse "cannot stop container: $3: permission denied"
	if grep -qx -- --rm "$box/arguments" 2>/dev/null; then become removing; else become exited; fi
	echo "$3"
	;;
kill)
	open "$1"
	case $status in
	running | paused | restarting) become exited ;;
	*) refuse "Error response from daemon: cannot kill container: $1: container 4f22 is not running" ;;
	esac
	;;
unpause)
	open "$1"
	[ "$status" = paused ] || refuse "Error response from daemon: Container 4f22 is not paused"
	become running
	;;
logs)
	[ "$1 $2" = "--tail 20" ] || refuse "unknown flag: $*" 125
	open "$3"
	echo "torch.OutOfMemoryError: CUDA out of memory"
	;;
container)
	[ "$engine" = podman ] || refuse "docker: unknown command: docker container $1" 1
	[ "$2" = --tcp-established ] || refuse "Error: CRIU: connected TCP socket found, --tcp-established is needed" 125
	open "$3"
	case $1 in
	checkpoint)
		[ "$status" = running ] || refuse "Error: \"$3\" is not running, cannot checkpoint" 125
		[ ! -e "$FAKE_DIR/checkpoint_fails" ] || refuse "Error: criu failed: cuda_plugin: Unable to checkpoint" 125
		: >"$box/checkpoint"
		become exited
		;;
	restore)
		[ -e "$box/checkpoint" ] || refuse "Error: container 4f22 is not checkpointed" 125
		[ ! -e "$FAKE_DIR/restore_fails" ] || refuse "Error: criu failed: type RESTORE errno 0" 125
		rm "$box/checkpoint"
		become running
		;;
	*) refuse "unknown command" 125 ;;
	esac
	;;
*) refuse "unknown command \"$command\"" 1 ;;
esac
