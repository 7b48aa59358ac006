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
#   LOG_DIR       for its log; the one before is kept as .log.1          $PID_DIR
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

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] ||
		not_set_up "nobody answers at $url, and MODEL is not set: start trtllm-serve there, or say what to serve"
	# shellcheck disable=SC2016
	printf '%s %s %s\n' "${TRTLLM_SERVE:-trtllm-serve}" \
		'"$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --enable_sleep_mode' "${ARGS:-}"
}

is_ready() { get "$url$health_path" >/dev/null && is_ours; }

# ---- shared: alias
is_ours() { # does our server answer there, and not somebody else's? The alias tells.
	served=$(get "$url/v1/models" | tr -d '[:space:]') || return 1
	case $served in
	*"\"id\":\"$(printf %s "$alias" | tr -d '[:space:]')\""*) ;;
	*) return 1 ;;
	esac
}
# ---- end of alias

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

# ---- shared: process
born() { # print when a process was started: with its number, that tells it from any other, even after a reboot
	if [ -r /proc/self/stat ]; then
		{ read -r stat <"/proc/$1/stat"; } || return 1
		# shellcheck disable=SC2086 # fields: state, parent, group, …, the 20th is the time
		set -- ${stat##*) }
		echo "${20}-$boot"
	else
		ps -o lstart= -p "$1" | tr -s ' ' '-'
	fi 2>/dev/null
}

signal_group() { kill "-$1" "-$pid" 2>/dev/null; } # this way dash, bash and busybox understand it

engine_runs() { # is the process of the pid file left, or one that it started? Zombies do not count.
	signal_group 0 || return 1
	leader=$(born "$pid")
	[ "${leader:-$started}" = "$started" ] || return 1 # its number has gone to another process
	[ -r /proc/self/stat ] || return 0
	[ "${started#*-}" = "$boot" ] || return 1
	for file in /proc/[0-9]*/stat; do
		{ read -r stat <"$file"; } 2>/dev/null || continue
		stat=${stat##*) }
		group=${stat#* * }
		[ "${group%% *}" != "$pid" ] || [ "${stat%% *}" = Z ] || return 0
	done
	return 1
}

find_engine() { # read the pid file; fail if no process of that engine is left
	[ -r "$pid_file" ] && read -r pid started state <"$pid_file" && [ -n "$started" ] || return 1
	case $pid in
	'' | 0 | 1 | *[!0-9]*) return 1 ;;
	esac
	engine_runs
}

end_engine() { # send $1 to it and what it started, and wait up to $2 seconds for all to be gone
	signal_group "$1"
	tenths=$(($2 * 10))
	while engine_runs; do
		[ "$tenths" -gt 0 ] || return 1
		tenths=$((tenths - 1))
		sleep 0.1
	done
	rm -f "$pid_file"
}
start_engine() { # in a session of its own: no signal that is meant for the hook reaches it
	line=$(command_line) || exit
	eval "set -- $line"
	has "$1" || not_set_up "no such program: $1"
	mkdir -p "$pid_dir" "$log_dir" || exit 2
	rm -f "$pid_file"
	[ ! -f "$log" ] || mv -f "$log" "$log.1"
	# This script itself writes the pid file and then becomes the engine: a hook that is killed leaves no orphan.
	if has setsid; then
		setsid sh "$0" become-engine "$@" </dev/null >"$log" 2>&1 &
	elif has python3; then
		python3 -c 'import os, sys; os.setsid(); os.execvp("sh", sys.argv[1:])' \
			sh "$0" become-engine "$@" </dev/null >"$log" 2>&1 &
	else
		not_set_up "needs setsid or python3, to detach the engine"
	fi
	tries=0
	until [ -f "$pid_file" ]; do
		tries=$((tries + 1))
		[ "$tries" -lt 100 ] || fail "could not be started: see $log"
		sleep 0.02
	done
	read -r pid started state <"$pid_file"
}

become_engine() {
	echo "$$ $(born $$)" >"$pid_file.new" && mv -f "$pid_file.new" "$pid_file" || exit 2
	exec "$@"
}

note() { # keep a word about the engine in its pid file
	echo "$pid $started $1" >"$pid_file.new" && mv -f "$pid_file.new" "$pid_file" || exit 1
	state=$1
}

wake_engine() {
	if is_ready; then
		say "is awake already"
		return
	fi
	mine=''
	if find_engine && [ "$state" = ready ]; then
		say "process $pid no longer answers; it is ended before a new one is started"
		end_engine TERM "${GRACE:-10}" || end_engine KILL 10 || fail "process $pid does not end, even after KILL"
	fi
	strangers=0
	until is_ready; do
		if find_engine; then
			! get "$url$health_path" >/dev/null || strangers=$((strangers + 1))
			[ "$strangers" -lt 20 ] || fail "something answers at $url, but it is not $name"
		elif [ -n "$mine" ]; then
			say "ended while it was starting; the end of $log:" >&2
			tail -n 20 "$log" >&2
			rm -f "$pid_file"
			exit 1
		else
			! speaks_http || fail "something else answers at $url, not $name"
			mine=yes
			start_engine
		fi
		sleep 0.1
	done
	if find_engine; then
		note ready
		say "process $pid is ready at $url"
	else
		say "is awake at $url; this script has not started it"
	fi
}

nothing_runs() { # what is left to say when the pid file leads to no process
	rm -f "$pid_file"
	! is_ours || fail "$url answers, but this script has not started what does: end it by hand"
	say "does not run"
}

sleep_engine() {
	if ! find_engine; then
		nothing_runs
	else
		end_engine TERM "${GRACE:-10}" || end_engine TERM 2 || end_engine KILL 10 ||
			fail "process $pid does not end, even after KILL"
		say "process $pid has ended"
	fi
}

stop_engine() {
	if ! find_engine; then
		nothing_runs
	else
		end_engine KILL 10 || fail "process $pid does not end, even after KILL"
		say "process $pid was killed"
	fi
}

boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
pid_dir=${PID_DIR:-${XDG_STATE_HOME:-${HOME:-/root}/.local/state}/llmux/engines}
log_dir=${LOG_DIR:-$pid_dir}
file_name=$(printf %s "$name" | tr -c 'A-Za-z0-9._-' _)-$port
pid_file=$pid_dir/$file_name.pid
log=$log_dir/$file_name.log
action=${1:-${LLMUX_HOOK:-}}

[ -n "$name" ] || not_set_up "LLMUX_MODEL is not set"
[ -n "$port" ] || not_set_up "LLMUX_PORT is not set"
has curl || has python3 || has wget || not_set_up "needs curl, python3 or wget, to ask the engine"
# ---- end of process

# ---- shared: canary
idle_soon() { # wait up to $GRACE seconds for the last request to end
	tenths=$((${GRACE:-10} * 10))
	until is_idle; do
		[ "$tenths" -gt 0 ] || return 1
		tenths=$((tenths - 1))
		sleep 0.1
	done
}

ask_token() { # ask for one token, or what $CANARY_JSON asks for
	question="{\"model\":$(json_text "$alias"),\"prompt\":\"The capital of France is\",\"max_tokens\":1,\"temperature\":0}"
	ask POST "$url${CANARY_PATH:-/v1/completions}" "${CANARY_JSON:-$question}" "${CANARY_SECONDS:-60}"
}

canary() { # has it come back with its senses?
	[ "${CANARY_PATH-yes}" ] || return 0
	ask_token || {
		case $status in
		4??) say "a model that does not complete text wants another CANARY_PATH and CANARY_JSON, or an empty CANARY_PATH" >&2 ;;
		esac
		fail "is awake, but does not answer: $(answered)"
	}
	case $answer in
	*"${CANARY_EXPECT:-}"*) ;;
	*) fail "is awake, but talks nonsense; '$CANARY_EXPECT' is not in its answer: $answer" ;;
	esac
}
# ---- end of canary

# ---- shared: foreign
not_hanging() { # a server that others have started: its silence is no proof that it has gone
	ask GET "$url$health_path"
	case $status in
	refused | 2??) ;; # nobody, or somebody else
	*) fail "this script has not started what is at $url, and it does not answer as it should: $(answered)" ;;
	esac
}

stop_whatever() { # ours, or with $STOP what others have started
	if ! find_engine; then
		ask GET "$url$health_path"
		case $status in
		refused) ;;
		2??) ! is_ours || set -- foreign ;;
		*) set -- foreign ;;
		esac
	fi
	if [ $# -eq 0 ]; then
		stop_engine
		return
	fi
	[ -n "${STOP:-}" ] ||
		not_set_up "this script has not started what is at $url: set STOP to a command that ends it"
	say "runs: $STOP"
	sh -c "$STOP" </dev/null || fail "'$STOP' failed"
	tenths=$((${GRACE:-10} * 10))
	while is_ours; do
		[ "$tenths" -gt 0 ] || fail "still answers, after '$STOP'"
		tenths=$((tenths - 1))
		sleep 0.1
	done
}
# ---- end of foreign

order() { # METHOD PATH [SECONDS]: a signed request; sets $status and $answer, as ask does
	method=$1 address=$url$2 seconds=${3:-${ASK_SECONDS:-5}}
	answer='' status=none code=0
	answer=$(python3 -c 'import hashlib, hmac, os, secrets, signal, sys, time, urllib.error as e, urllib.request as r
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
			end_engine TERM "$GRACE" || end_engine KILL 10 || fail "process $pid does not end, even after KILL"
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
