#!/bin/sh
# TensorRT-LLM's trtllm-serve in sleep mode: the process stays, its memory is released. Started when it does not run.
#
#   models:
#     llama:
#       port: 8004
#       wake:   ./hooks/trtllm.sh wake
#       sleep:  ./hooks/trtllm.sh sleep
#       alive:  ./hooks/trtllm.sh alive
#       stop:   ./hooks/trtllm.sh stop
#       verify: ./hooks/gpu-free.sh
#       env:
#         MODEL: meta-llama/Llama-3.1-8B-Instruct
#         TRTLLM_RUNTIME_CONTROL_API_KEY: ${TRTLLM_RUNTIME_CONTROL_API_KEY}
#         MAX_USED: "4096"
#         OWN_MAX: "4096"
#
# A prototype of NVIDIA's (PyTorch backend): orders are signed with a key that the server and this script share.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the server if it does not run; resume its memory if it is parked; ask for one token; if awake, nothing
#   sleep   release the memory (the server itself ends its requests first); if it is parked, nothing
#   alive   succeed if it is running and answers
#   stop    KILL, or $STOP for a server that this script has not started
#   verify  succeed if it is parked, or does not run
#
# Needs: python3; to start the server, trtllm-serve.
#
# Environment
#   TRTLLM_RUNTIME_CONTROL_API_KEY   the key; required, for the server as well
#   MODEL         what to serve: a name on Hugging Face, or a folder; without it, the server is not started here: run
#                 it with trtllm-serve … --enable_sleep_mode
#   TRTLLM_SERVE  the command, as shell words                            trtllm-serve
#   ARGS          more options for it, as shell words                    none
#   ALIAS         the name it answers under                              $MODEL; of a folder, its name
#   CANARY_PATH   where one token is asked for after waking; empty: nowhere             /v1/completions
#   CANARY_JSON   what is asked there                                    one token of "The capital of France is"
#   CANARY_EXPECT a text that the answer has to contain                  none
#   CANARY_SECONDS   how long that may take                              60
#   SLEEP_SECONDS, WAKE_SECONDS   how long releasing and resuming may take          240, 600
#   STOP          a command that ends a server that this script has not started         none
#   LLMUX_SLEEP_LEVEL   where llmux wants it, for a model with `levels`: stop (ended), or any other (parked)
#   LLMUX_MODEL, LLMUX_PORT, LLMUX_URL   given by llmux
#   HOST, PORT    where it listens                                       127.0.0.1, $LLMUX_PORT
#   URL           where it is asked                                      $LLMUX_URL, or http://127.0.0.1:$PORT
#   GRACE         seconds from TERM to the second TERM                   20
#   PID_DIR       for the file that says which process it is             ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   LOG_DIR       for its log, cut at LOG_MIB (64); before: .log.1       $PID_DIR
#   ASK_SECONDS   how long an answer may take                            5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for trtllm-serve (a real process with its control API, which checks signatures), under dash,
# bash and busybox, on Debian 12. Not with TensorRT-LLM itself.

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

name=${LLMUX_MODEL:-}
alias=${ALIAS:-${MODEL:-$name}}
[ -n "${ALIAS:-}" ] || [ ! -d "$alias" ] || alias=$(basename "$alias")
port=${PORT:-${LLMUX_PORT:-}}
url=${URL:-${LLMUX_URL:-http://127.0.0.1:$port}}
health_path=/health
GRACE=${GRACE:-20}

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy trtllm' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/process.sh"
. "$lib/sleeping.sh"

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] ||
		not_set_up "nothing answers at $url, and MODEL is not set: start trtllm-serve there, or say what to serve"
	# shellcheck disable=SC2016
	printf '%s %s %s\n' "${TRTLLM_SERVE:-trtllm-serve}" \
		'"$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --enable_sleep_mode' "${ARGS:-}"
}

is_ours() { answers_as "$alias"; }

is_ready() { is_healthy && is_ours; }

order() { # METHOD PATH [SECONDS]: a signed request; sets $status and $answer, as ask does
	method=$1 address=$url$2 seconds=${3:-${ASK_SECONDS:-5}}
	answer='' status=none code=0
	answer=$(python3 -I -S -c 'import hashlib, hmac, os, secrets, signal, sys, time, urllib.error as e, urllib.request as r
method, url, path, seconds = sys.argv[1:]
signal.setitimer(signal.ITIMER_REAL, float(seconds))
now, nonce, body = str(int(time.time())), secrets.token_hex(16), b"{}" if method == "POST" else b""
signed = "\n".join(("trtllm-runtime-control-v1", method, path, now, nonce, "")).encode() + body
key = os.environ["TRTLLM_RUNTIME_CONTROL_API_KEY"].encode()
head = "x-trtllm-runtime-control-"
request = r.Request(url + path, body or None, method=method, headers={
    head + "auth": "sha256=" + hmac.new(key, signed, hashlib.sha256).hexdigest(),
    head + "timestamp": now, head + "nonce": nonce, "Content-Type": "application/json"})
try:
    with r.build_opener(r.ProxyHandler({})).open(request) as reply: code, text = reply.status, reply.read()
except e.HTTPError as error: code, text = error.code, error.read()
except e.URLError as error: sys.exit(7 if isinstance(error.reason, ConnectionRefusedError) else 1)
sys.stdout.buffer.write(text + b"\n%d" % code)' "$method" "$url" "$2" "$seconds" 2>/dev/null) || code=$?
	took
}

look() { # set $memory to running, parking, parked, waking or failed
	order GET /memory_status || {
		case $status in
		401) fail "refuses the signature: TRTLLM_RUNTIME_CONTROL_API_KEY has to be the server's own" ;;
		404) not_set_up "$url/memory_status is not there: start trtllm-serve with --enable_sleep_mode" ;;
		*) fail "does not say what its memory does: $(answered)" ;;
		esac
	}
	memory=$(printf %s "$answer" | tr -d '[:space:]' | sed -n 's/.*"state":"\([a-z]*\)".*/\1/p')
}

settle() { # wait until nothing is under way
	tenths=$(($1 * 10))
	look
	while [ "$memory" = parking ] || [ "$memory" = waking ]; do
		[ "$tenths" -gt 0 ] || fail "is still $memory after $1 s"
		tenths=$((tenths - 1))
		sleep 0.1
		look
	done
}

wake() {
	if is_ready; then
		settle "${WAKE_SECONDS:-600}"
		case $memory in
		running)
			say "is awake already"
			return
			;;
		parked)
			order POST /resume_memory "${WAKE_SECONDS:-600}" || fail "$(answered)"
			settle "${WAKE_SECONDS:-600}"
			[ "$memory" = running ] || fail "was told to resume its memory, but it is $memory"
			say "has woken"
			;;
		*)
			find_engine || fail "its memory is $memory: restart it"
			say "its memory is $memory: it is started anew"
			end_engine TERM "$GRACE" || kill_engine
			wake_engine
			;;
		esac
	else
		wake_engine
		settle 60
		[ "$memory" = running ] || fail "was started just now, but its memory is $memory"
	fi
	canary
}

go_to_sleep() {
	if ! is_ready; then # it does not run, or starts, or hangs
		find_engine || not_hanging
		sleep_engine
		return
	elif [ "${LLMUX_SLEEP_LEVEL:-}" = stop ]; then
		sleep_engine
		return
	fi
	settle "${SLEEP_SECONDS:-240}"
	case $memory in
	parked) say "sleeps already" ;;
	running)
		order POST /release_memory "${SLEEP_SECONDS:-240}" || fail "$(answered)"
		settle "${SLEEP_SECONDS:-240}"
		[ "$memory" = parked ] || fail "was told to release its memory, but it is $memory"
		say "sleeps"
		;;
	*)
		find_engine || fail "its memory is $memory: restart it"
		say "its memory is $memory"
		sleep_engine
		;;
	esac
}

set_up "$@"

has python3 || not_set_up "needs python3, to sign its orders"
[ -n "${TRTLLM_RUNTIME_CONTROL_API_KEY:-}" ] ||
	not_set_up "TRTLLM_RUNTIME_CONTROL_API_KEY is not set: the key that the server checks orders with"

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
stop) stop_whatever ;;
alive)
	is_ready || fail "is not ready at $url"
	look
	[ "$memory" = running ] || fail "its memory is $memory"
	;;
verify)
	if is_ready; then
		look
		[ "$memory" = parked ] || fail "its memory is $memory"
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
