#!/bin/sh
# SGLang with its memory saver: the process stays, its memory is released and resumed. Started when it does not run.
#
#   models:
#     qwen:
#       port: 8003
#       wake:   ./hooks/sglang.sh wake
#       sleep:  ./hooks/sglang.sh sleep
#       alive:  ./hooks/sglang.sh alive
#       stop:   ./hooks/sglang.sh stop
#       verify: ./hooks/gpu-free.sh
#       env: {MODEL: Qwen/Qwen3-8B, MAX_USED: "4096", OWN_MAX: "4096"}
#
# SGLang does not say whether it sleeps, and dies of being told twice, or under a request. So this script starts the
# server itself, and keeps account of what it has told this very process.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the server if it does not run; resume its memory if it sleeps; ask for one token; if awake, nothing
#   sleep   wait until no request is in flight, then release the memory; if it is released, nothing. A server which was
#           left half way, because its hook was killed, is ended
#   alive   succeed if it is awake and answers under its name
#   stop    KILL; return when all its processes are gone
#   verify  succeed if it sleeps, or does not run
#
# Needs: sglang; setsid or python3; curl or python3.
#
# Environment
#   LLMUX_SLEEP_LEVEL   where llmux wants it, for a model with `levels`: stop (ended), or any other (released)
#   MODEL         what to serve: a name on Hugging Face, or a folder; required to wake
#   SGLANG        the command, as shell words                            python3 -m sglang.launch_server
#   ARGS          more options for it, as shell words                    none
#   CANARY_PATH   where one token is asked for after waking; empty: nowhere             /v1/completions
#   CANARY_JSON   what is asked there                                    one token of "The capital of France is"
#   CANARY_EXPECT a text that the answer has to contain                  none
#   CANARY_SECONDS   how long that may take                              60
#   SLEEP_SECONDS, WAKE_SECONDS   how long releasing and resuming may take          240, 600
#   ALIAS         the name it answers under                              $LLMUX_MODEL
#   API_KEY       its key (give it to the server with ARGS)              none
#   ADMIN_KEY     its --admin-api-key, where it has one (likewise)       $API_KEY
#   HOST, PORT    where it listens                                       127.0.0.1, $LLMUX_PORT
#   URL           where it is asked                                      $LLMUX_URL, or http://127.0.0.1:$PORT
#   GRACE         seconds to wait for the last request, and from TERM to the second TERM          20
#   PID_DIR       for the file that says which process it is and whether it sleeps
#                 ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   LOG_DIR       for its log, cut at LOG_MIB (64); before: .log.1       $PID_DIR
#   ASK_SECONDS   how long an answer may take                            5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for SGLang's server (a real process with its HTTP API, which dies of what SGLang dies of),
# under dash, bash and busybox, on Debian 12. With SGLang 0.5.23 itself on the CPU, where it has no memory saver: started,
# stopped and killed, not slept.

# shellcheck disable=SC2034,SC2119,SC2120 # lib/ uses variables; functions set their arguments themselves
set -u

name=${LLMUX_MODEL:-}
alias=${ALIAS:-$name}
port=${PORT:-${LLMUX_PORT:-}}
url=${URL:-${LLMUX_URL:-http://127.0.0.1:$port}}
health_path=/health
auth=${API_KEY:+Authorization: Bearer $API_KEY}
GRACE=${GRACE:-20}
leader_ends_all=yes # TERM kills its schedulers before they have released their memory, and it waits for 5 s

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy sglang' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/process.sh"
. "$lib/sleeping.sh"

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] || not_set_up "MODEL is not set: what to serve"
	# shellcheck disable=SC2016
	printf '%s %s %s\n' "${SGLANG:-python3 -m sglang.launch_server}" \
		'--model-path "$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --served-model-name "$alias" --enable-memory-saver' \
		"${ARGS:-}"
}

is_ours() { answers_as "$alias"; }

is_ready() { is_healthy && is_ours; }

order() { # PATH [JSON] [SECONDS]: ask with the key that orders need, which may not be the one for answers
	models_auth=$auth
	[ -z "${ADMIN_KEY:-}" ] || auth="Authorization: Bearer $ADMIN_KEY"
	given=0
	ask POST "$url$1" "${2:-}" "${3:-}" || given=1
	auth=$models_auth
	case $status in
	401 | 403)
		[ "$state" != resuming ] || note asleep # still, and with the right key it can be woken
		not_set_up "SGLang refuses the key, which is its --admin-api-key (ADMIN_KEY) or --api-key: $(answered)"
		;;
	esac
	return "$given"
}

is_idle() { # the cache can be flushed only while no request runs or waits
	order /flush_cache || [ "$status" = 404 ]
}

is_awake() { find_engine && [ "$state" = ready ] && is_ready; }

restart() {
	say "$1: it is started anew"
	end_engine TERM "$GRACE" || kill_engine
	wake_engine
}

wake() {
	if is_awake; then
		say "is awake already"
		return
	fi
	if ! find_engine; then
		! is_ready ||
			fail "this script has not started what answers at $url, so it cannot tell whether it sleeps: end it by hand"
		wake_engine
	else
		case $state in
		asleep)
			if is_ours; then # its /health would have it make a token, of which some versions die while they sleep
				note resuming
				order /resume_memory_occupation '{}' "${WAKE_SECONDS:-600}" || fail "$(answered)"
				note ready
				say "has woken"
			else
				restart "does not answer"
			fi
			;;
		releasing | resuming) restart "it is not known how far it came" ;;
		*) wake_engine ;;
		esac
	fi
	canary
}

go_to_sleep() {
	find_engine || nothing_runs || return 0
	if [ "${LLMUX_SLEEP_LEVEL:-}" = stop ]; then
		sleep_engine
	elif [ "$state" = asleep ]; then
		say "sleeps already"
	elif [ "$state" != ready ] || ! is_ready; then # it starts, or hangs, or was left half way
		sleep_engine
	else
		idle_soon || fail "has requests in flight after $GRACE s: it would die of releasing its memory"
		note releasing
		order /release_memory_occupation '{}' "${SLEEP_SECONDS:-240}" || fail "$(answered)"
		if ! is_ours || ! engine_runs; then
			fail "said that its memory is released, but has died of it: see $log"
		fi
		note asleep
		say "sleeps"
	fi
}

set_up "$@"

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
stop) stop_engine ;;
alive) is_awake || fail "is not awake at $url" ;;
verify) ! find_engine || [ "$state" = asleep ] || fail "process $pid is there, and has not released its memory" ;;
become-engine)
	shift
	become_engine "$@"
	;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
