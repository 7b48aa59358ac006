#!/bin/sh
# A Podman container with any engine in it: started to wake, stopped to sleep.
#
#   models:
#     qwen:
#       port: 8002
#       wake:  ./hooks/podman.sh wake
#       sleep: ./hooks/podman.sh sleep
#       alive: ./hooks/podman.sh alive
#       stop:  ./hooks/podman.sh stop
#       env:
#         CONTAINER: qwen
#         RUN: >-
#           --device nvidia.com/gpu=all -p 127.0.0.1:8002:8000
#           docker.io/vllm/vllm-openai --model Qwen/Qwen3-8B --served-model-name qwen
#         EXPECT: '"id":"qwen"'
#         GRACE: "30"
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the container, or run it if there is none; return when it answers; if it does already, nothing
#   sleep   stop it: TERM, and KILL after $GRACE seconds; return when it is down. `pause` would free no GPU memory
#   alive   succeed if it runs and answers
#   stop    KILL; return when it is down
#   verify  succeed if it is down
#
# Needs: podman; one of curl, python3, wget.
#
# Environment
#   CONTAINER      its name                                             $LLMUX_MODEL
#   RUN            what comes after `podman run --detach --name $CONTAINER`, as shell words, for when there is none
#   PODMAN         the command, as shell words: 'sudo podman'           podman
#   HEALTH_PATH    the path that answers 2xx once it is ready           /health
#   EXPECT         a text that only this server's answer contains       none
#   EXPECT_PATH    the path whose answer contains it                    /v1/models
#   URL            where it is asked                                    $LLMUX_URL
#   GRACE          seconds from TERM to KILL                            10
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
	echo "$0: $lib is missing; 'llmux hooks copy podman' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/containers.sh"

set_up "$@"
act
