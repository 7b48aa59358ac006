#!/bin/sh
# vLLM in sleep mode: the process stays, its weights leave the GPU and come back. Started when it does not run.
#
#   models:
#     qwen:
#       port: 8002
#       wake:   ./hooks/vllm-sleep.sh wake
#       sleep:  ./hooks/vllm-sleep.sh sleep
#       alive:  ./hooks/vllm-sleep.sh alive
#       stop:   ./hooks/vllm-sleep.sh stop
#       verify: ./hooks/gpu-free.sh
#       env: {MODEL: Qwen/Qwen3-8B, LEVEL: "1", MAX_USED: "4096", OWN_MAX: "4096"}
#
# Level 1 keeps the weights in the host's memory (which has to be large enough) and wakes within seconds. Level 2
# drops them; waking reads them from the disk again: without that step vLLM answers nonsense.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the server if it does not run; wake it if it sleeps; ask for one token; if it is awake, nothing
#   sleep   wait until no request is in flight (to sleep under one kills vLLM), then sleep; if it sleeps, nothing. A
#           server that is half awake, after a wake that failed, is ended: part of its memory is in use for good
#   alive   succeed if it is awake and answers under its name
#   stop    KILL, or $STOP for a server that this script has not started
#   verify  succeed if it sleeps, or does not run
#
# vLLM's development routes ask for no key: let it listen on loopback only.
#
# Needs: curl or python3; to start vLLM, vllm and setsid or python3.
#
# Environment
#   MODEL         what to serve: a name on Hugging Face, or a folder; without it, the server is not started here: run
#                 it with VLLM_SERVER_DEV_MODE=1 vllm serve … --enable-sleep-mode
#   LLMUX_SLEEP_LEVEL   where llmux wants it, for a model with `levels: [1: 18GiB, stop]`: 1, 2, or stop (ended)
#   LEVEL         1 or 2, for a model without                            1
#   CANARY_PATH   where one token is asked for after waking; empty: nowhere             /v1/completions
#   CANARY_JSON   what is asked there                                    one token of "The capital of France is"
#   CANARY_EXPECT a text that the answer has to contain                  none
#   CANARY_SECONDS   how long that may take                              60
#   SLEEP_SECONDS, WAKE_SECONDS   how long one of vLLM's steps may take  240, 1500
#   STOP          a command that ends a server that this script has not started         none
#   VLLM          the command, as shell words; it gets `serve MODEL …`   vllm
#   ARGS          more options for it, as shell words                    none
#   ALIAS         the name it answers under                              $LLMUX_MODEL
#   API_KEY       its key; reaches it as VLLM_API_KEY                    none
#   HOST, PORT    where it listens                                       127.0.0.1, $LLMUX_PORT
#   URL           where it is asked                                      $LLMUX_URL, or http://127.0.0.1:$PORT
#   GRACE         seconds to wait for the last request, and from TERM to the second TERM          20
#   PID_DIR       for files that say which process it is and how it sleeps
#                 ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   LOG_DIR       for its log, cut at LOG_MIB (64); before: .log.1       $PID_DIR
#   ASK_SECONDS   how long an answer may take                            5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for vLLM's server (a real process with vLLM's HTTP API, which dies of what vLLM dies of),
# under dash, bash and busybox, on Debian 12. With the server and the scheduler of vLLM 0.32 itself on the CPU, and in
# place of its worker's sleep, which the CPU build does not have, one that loses weights and cache (make engines).

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

name=${LLMUX_MODEL:-}
alias=${ALIAS:-$name}
port=${PORT:-${LLMUX_PORT:-}}
url=${URL:-${LLMUX_URL:-http://127.0.0.1:$port}}
health_path=/health
level=${LLMUX_SLEEP_LEVEL:-${LEVEL:-1}}
auth=${API_KEY:+Authorization: Bearer $API_KEY}
GRACE=${GRACE:-20}
[ -z "${API_KEY:-}" ] || export VLLM_API_KEY="$API_KEY"
export VLLM_SERVER_DEV_MODE=1

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy vllm-sleep' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/process.sh"
. "$lib/sleeping.sh"

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] ||
		not_set_up "nothing answers at $url, and MODEL is not set: start vLLM there, or say what to serve"
	# shellcheck disable=SC2016
	printf '%s %s %s\n' "${VLLM:-vllm}" \
		'serve "$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --served-model-name "$alias" --enable-sleep-mode' \
		"${ARGS:-}"
}

is_ours() { answers_as "$alias"; }

is_ready() { is_healthy && is_ours; }

look() { # set $asleep to yes or no; fail if vLLM does not say
	if ask GET "$url/is_sleeping"; then
		case $answer in
		*true*) asleep=yes ;;
		*) asleep=no ;;
		esac
	elif [ "$status" = 404 ]; then
		not_set_up "$url/is_sleeping is not there: start vLLM with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"
	else
		fail "does not say whether it sleeps: $(answered)"
	fi
}

is_idle() { # vLLM's own count of requests; without metrics, nothing is known
	if ! ask GET "$url/metrics"; then
		[ "$status" = 404 ]
		return
	fi
	busy=$(printf '%s\n' "$answer" | awk '/^vllm:num_requests_(running|waiting)[{ ]/ { n += $NF } END { print n + 0 }')
	[ "$busy" != 0 ] || return 0
	# After a client has left, the figures may stand still until the next request: a token brings them up to date.
	[ "$((tenths % 20))" -ne 10 ] || [ -z "${CANARY_PATH-yes}" ] || ask_token
	return 1
}

remember() { # 1 or 2: how it was put to sleep; waking: a wake has begun and not ended
	mkdir -p "$pid_dir" && echo "$1" >"$sleep_file" || exit 1
}

step() { # one order to vLLM
	ask POST "$url$1" "${2:-}" "${WAKE_SECONDS:-1500}" || fail "$(answered)"
}

prefixes_are_reset() { # vLLM answers 200 also while it could not, because a block of them is still in use
	step /reset_prefix_cache
	case $(printf %s "$answer" | tr -d '[:space:]') in
	*'"success":false'*) return 1 ;;
	esac
}

reset_prefixes() { # what was computed with weights that are no more
	wait_for "$((GRACE * 10))" prefixes_are_reset || fail "keeps what it computed before it slept: $(answered)"
}

wake() {
	if ! is_ready; then
		wake_engine
		look
		[ "$asleep" = no ] || fail "sleeps although it was started just now"
		rm -f "$sleep_file"
		canary
		return
	fi
	look
	slept=$(cat "$sleep_file" 2>/dev/null)
	if [ "$asleep" = no ]; then
		[ "$slept" != waking ] || reset_prefixes # a wake has come this far, and not ended
		[ -z "$slept" ] || canary
		rm -f "$sleep_file"
		say "is awake already"
		return
	fi
	if [ "$slept" = waking ]; then
		find_engine || fail "is half awake, after a wake that did not end: restart it"
		say "is half awake, after a wake that did not end: it is started anew"
		end_engine TERM "$GRACE" || kill_engine
		wake
		return
	fi
	remember waking
	if [ "$slept" = 1 ]; then
		step /wake_up
	else # weights that were dropped have to be read again, before there is room for anything else
		step '/wake_up?tags=weights'
		step /collective_rpc '{"method":"reload_weights"}'
		step '/wake_up?tags=kv_cache'
		reset_prefixes
	fi
	look
	[ "$asleep" = no ] || fail "still sleeps, although it was woken"
	canary
	rm -f "$sleep_file"
	say "has woken from level ${slept:-2}"
}

go_to_sleep() {
	if ! is_ready; then # it does not run, or starts, or hangs
		find_engine || not_hanging
		sleep_engine
		rm -f "$sleep_file"
		return
	fi
	if [ "$level" = stop ]; then
		sleep_engine
		rm -f "$sleep_file"
		return
	fi
	look
	if [ "$asleep" = yes ]; then
		case $(cat "$sleep_file" 2>/dev/null).$level in
		waking.*)
			find_engine || fail "is half awake, after a wake that failed: restart it"
			say "is half awake, after a wake that failed"
			sleep_engine
			rm -f "$sleep_file"
			;;
		1.2) fail "sleeps at level 1, and cannot go to 2 from there: let its levels be 1 and stop" ;;
		*) say "sleeps already" ;;
		esac
		return
	fi
	idle_soon || fail "has requests in flight after $GRACE s: it would die of going to sleep"
	remember "$level"
	ask POST "$url/sleep?level=$level&mode=wait" '' "${SLEEP_SECONDS:-240}" || fail "$(answered)"
	look
	[ "$asleep" = yes ] || fail "said that it sleeps, but does not"
	is_ready || fail "said that it sleeps, but has died of it: $(answered)"
	say "sleeps at level $level"
}

stop() {
	stop_whatever
	rm -f "$sleep_file"
}

set_up "$@"

sleep_file=$pid_dir/$file_name.sleep
case $level in
1 | 2 | stop) ;;
*) not_set_up "LEVEL is 1 or 2, and a level of the model's 1, 2 or stop; not '$level'" ;;
esac

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
stop) stop ;;
alive)
	is_ready || fail "is not ready at $url"
	look
	[ "$asleep" = no ] || fail "sleeps"
	;;
verify)
	if is_ready; then
		look
		[ "$asleep" = yes ] || fail "is awake"
		[ "$(cat "$sleep_file" 2>/dev/null)" != waking ] || fail "is half awake"
	else
		! find_engine || fail "process $pid is there, but does not answer"
	fi
	;;
become-engine)
	shift
	become_engine "$@"
	;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
