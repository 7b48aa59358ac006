#!/bin/sh
# A Podman container that is checkpointed with its GPU memory to sleep, and restored to wake.
#
#   models:
#     qwen:
#       port: 8002
#       wake:  ./hooks/podman-criu.sh wake
#       sleep: ./hooks/podman-criu.sh sleep
#       alive: ./hooks/podman-criu.sh alive
#       stop:  ./hooks/podman-criu.sh stop
#       env:
#         CONTAINER: qwen
#         RUN: --device nvidia.com/gpu=all -p 127.0.0.1:8002:8000 docker.io/vllm/vllm-openai --model Qwen/Qwen3-8B
#         EXPECT: '"id":"Qwen/Qwen3-8B"'
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    restore the container from its checkpoint; where there is none, or it cannot be restored, start it from
#           nothing, or run it; return when it answers; if it does already, nothing
#   sleep   checkpoint it, which ends it; if it is down, nothing. If it cannot be checkpointed, it runs on: give `stop`
#   alive   succeed if it runs and answers
#   stop    KILL; return when it is down. The next wake starts from nothing
#   verify  succeed if it is down
#
# Needs: podman, as root; CRIU 4.0 or later with its CUDA plugin, cuda-checkpoint and a driver from 570 on, on x86-64;
# one of curl, python3, wget.
#
# Environment
#   CONTAINER      its name                                             $LLMUX_MODEL
#   RUN            what comes after `podman run --detach --name $CONTAINER`, as shell words, for when there is none
#   PODMAN         the command, as shell words: 'sudo podman'           podman
#   CHECKPOINT     options of `podman container checkpoint`             --tcp-established
#   RESTORE        options of `podman container restore`                --tcp-established
#   CHECKPOINT_SECONDS, RESTORE_SECONDS   how long these may take       240, 600
#   HEALTH_PATH    the path that answers 2xx once it is ready           /health
#   EXPECT         a text that only this server's answer contains       none
#   EXPECT_PATH    the path whose answer contains it                    /v1/models
#   URL            where it is asked                                    $LLMUX_URL
#   START_SECONDS  how long `podman start` or `podman run` (with its pull) may take          900
#   ASK_SECONDS    how long an answer may take                          5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for podman that keeps its containers' states, under dash, bash and busybox, on Debian 12.

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

engine=${PODMAN:-podman}
container=${CONTAINER:-${LLMUX_MODEL:-}}
name=$container
url=${URL:-${LLMUX_URL:-}}
health_path=${HEALTH_PATH:-/health}

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy podman-criu' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/containers.sh"

is_checkpointed() {
	[ "$(inspect '{{.State.Checkpointed}}' 2>/dev/null)" = true ]
}

wake() {
	look
	if is_up; then
		say "$container is awake already"
		return
	fi
	if [ "$state" != none ] && [ "$state" != running ] && is_checkpointed; then
		eval "set -- ${RESTORE---tcp-established}"
		if container "${RESTORE_SECONDS:-600}" container restore "$@" "$container" >/dev/null; then
			wait_ready
			return
		fi
		say "$container cannot be restored: it is started from nothing"
		look
	fi
	start_container
	wait_ready
}

go_to_sleep() {
	if is_down; then
		say "$container is $state"
		return
	fi
	[ "$state" = running ] || fail "$container is $state: it cannot be checkpointed"
	eval "set -- ${CHECKPOINT---tcp-established}"
	container "${CHECKPOINT_SECONDS:-240}" container checkpoint "$@" "$container" >/dev/null ||
		fail "$container cannot be checkpointed"
	wait_down
	is_checkpointed || fail "$container is down, but has no checkpoint"
}

set_up "$@"

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
alive)
	look
	is_up || fail "$container is $state, and not ready at $url"
	;;
stop) kill_container ;;
verify) is_down || fail "$container is $state" ;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
