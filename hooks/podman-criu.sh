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

# ---- shared: expected
expected() { # does what answers say what only this server says? Without EXPECT there is nothing to go by.
	[ -n "${EXPECT:-}" ] || return 0
	served=$(get "$url${EXPECT_PATH:-/v1/models}") || return 1
	case $served in
	*"$EXPECT"*) ;;
	*) return 1 ;;
	esac
}
# ---- end of expected

# ---- shared: words
nl='
'
say() { printf '%s: %s\n' "$name" "$*"; }
fail() { say "$@" >&2 && exit 1; }
not_set_up() { say "$@" >&2 && exit 2; }
has() { command -v "$1" >/dev/null 2>&1; }
# ---- end of words

# ---- shared: http
ask() { # METHOD URL [JSON] [SECONDS]: set $status and $answer, succeed on 2xx. No status: "refused", or "none" in time
	method=$1 address=$2 json=${3:-} seconds=${4:-${ASK_SECONDS:-5}}
	answer='' status=none code=0
	if has curl; then
		# A key goes through standard input: the list of processes shows none.
		set -- -sS --noproxy '*' --max-time "$seconds" -X "$method" -w '\n%{http_code}'
		[ -z "$json" ] || set -- "$@" -H 'Content-Type: application/json' --data-binary "$json"
		answer=$(printf '%s\n' "${auth:+header = $(json_text "$auth")}" | curl -K - "$@" "$address" 2>/dev/null) || code=$?
	elif has python3; then
		answer=$(AUTH=${auth:-} python3 -c 'import os, signal, sys, urllib.error as e, urllib.request as r
method, url, body, seconds = sys.argv[1:]
signal.setitimer(signal.ITIMER_REAL, float(seconds))
request = r.Request(url, body.encode() or None, method=method)
name, _, value = os.environ["AUTH"].partition(": ")
for name, value in ((name, value), ("Content-Type", body and "application/json")):
    if value: request.add_header(name, value)
try:
    with r.build_opener(r.ProxyHandler({})).open(request) as reply: code, text = reply.status, reply.read()
except e.HTTPError as error: code, text = error.code, error.read()
except e.URLError as error: sys.exit(7 if isinstance(error.reason, ConnectionRefusedError) else 1)
sys.stdout.buffer.write(text + b"\n%d" % code)' "$method" "$address" "$json" "$seconds" 2>/dev/null) || code=$?
	elif [ "$method" = GET ] && [ -z "${auth:-}" ]; then # with wget, whatever is no success is a 500
		if answer=$(wget -q -O - -T "$seconds" "$address" 2>/dev/null); then
			answer=$answer${nl}200
		elif wget -S -O /dev/null -T "$seconds" "$address" 2>&1 | grep -q HTTP/; then
			answer=${nl}500
		else
			code=1
		fi
	else
		not_set_up "needs curl or python3, to tell the engine what to do"
	fi
	case $code in
	0) status=${answer##*"$nl"} answer=${answer%"$nl"*} ;;
	7) status=refused answer='' ;;
	*) answer='' ;;
	esac
	case $status in
	2??) ;;
	*) return 1 ;;
	esac
}

get() { ask GET "$1" && printf '%s\n' "$answer"; }

speaks_http() { # does anything answer there, whatever it says?
	ask GET "$url/" && return
	case $status in
	none | refused) return 1 ;;
	esac
}

answered() { # what it answered, in a line for people
	case $status in
	refused) echo "nobody listens at $url" ;;
	none) echo "$address did not answer within $seconds s" ;;
	*) printf '%s\n' "$method ${address#"$url"} answers $status: $(printf %s "$answer" | tr '\n' ' ' | cut -c 1-300)" ;;
	esac
}

json_text() { printf '"%s"' "$(printf %s "$1" | sed 's/[\\"]/\\&/g')"; }
# ---- end of http

# ---- shared: containers
container() { # run the container engine, for $1 seconds at most: its daemon may hang
	limit=$1
	shift
	eval "set -- $engine \"\$@\""
	if has timeout; then
		timeout -k 5 "$limit" "$@"
	else
		"$@"
	fi
}

inspect() { container 20 inspect --type container --format "$1" "$container"; }

look() { # set $state to what the container does; "none" when there is no such container
	state=$(inspect '{{.State.Status}}' 2>/dev/null) && return
	state=$(inspect '{{.State.Status}}' 2>&1) # the complaint, which has no place beside an answer
	case $state in
	*[Nn]'o such container'* | *[Nn]'o such object'*) state=none ;; # not "no such file", of a socket
	*) fail "$engine cannot say what $container does: $state" ;;
	esac
}

is_up() { [ "$state" = running ] && get "$url$health_path" >/dev/null && expected; }

wait_ready() { # until it answers, or has ended
	strangers=0
	until look && is_up; do
		case $state in
		running)
			! get "$url$health_path" >/dev/null || strangers=$((strangers + 1))
			[ "$strangers" -lt 10 ] || fail "something answers at $url, but '$EXPECT' is not in what it says"
			;;
		created | restarting | starting | configured | initialized) ;;
		*)
			say "$container is $state while it starts; the end of its log:" >&2
			container 20 logs --tail 20 "$container" >&2
			exit 1
			;;
		esac
		sleep 0.2
	done
	say "$container is ready at $url"
}

start_container() { # whatever it takes to have it run
	tenths=100
	while [ "$state" = removing ] && [ "$tenths" -gt 0 ]; do # one that was stopped with --rm holds its name for a while
		tenths=$((tenths - 1))
		sleep 0.1
		look
	done
	case $state in
	running | restarting) ;;
	paused) container 60 unpause "$container" >/dev/null || fail "$container cannot be unpaused" ;;
	none)
		[ -n "${RUN:-}" ] || not_set_up "there is no container $container: create it," \
			"or set RUN to what comes after '$engine run --detach --name $container'"
		eval "set -- $RUN"
		container "${START_SECONDS:-900}" run --detach --name "$container" "$@" >/dev/null || fail "$container cannot be run"
		;;
	*) container "${START_SECONDS:-900}" start "$container" >/dev/null || fail "$container cannot be started" ;;
	esac
}

is_down() {
	look
	case $state in
	none | exited | created | dead | stopped | configured | initialized) ;;
	*) return 1 ;;
	esac
}

wait_down() {
	tenths=100
	until is_down; do
		[ "$tenths" -gt 0 ] || fail "$container is still $state"
		tenths=$((tenths - 1))
		sleep 0.1
	done
	say "$container is $state"
}

kill_container() {
	is_down || [ "$state" != paused ] || container 60 unpause "$container" >/dev/null
	is_down || container 60 kill "$container" >/dev/null || is_down || fail "$container cannot be killed"
	wait_down
}

action=${1:-${LLMUX_HOOK:-}}
[ -n "$container" ] || not_set_up "neither CONTAINER nor LLMUX_MODEL is set"
case $container in
[!A-Za-z0-9]* | *[!A-Za-z0-9_.-]*) not_set_up "'$container' can be no container's name: set CONTAINER" ;;
esac
[ -n "$url" ] || not_set_up "LLMUX_URL is not set"
has "${engine%% *}" || not_set_up "no such program: ${engine%% *}"
has curl || has python3 || has wget || not_set_up "needs curl, python3 or wget, to ask the engine"
# ---- end of containers

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
