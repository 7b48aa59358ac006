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
#   LOG_DIR       for its log; the one before is kept as .log.1          $PID_DIR
#   ASK_SECONDS   how long an answer may take                            5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for vLLM's server (a real process with vLLM's HTTP API, which dies of what vLLM dies of),
# under dash, bash and busybox, on Debian 12. Not with vLLM itself.

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

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] ||
		not_set_up "nobody answers at $url, and MODEL is not set: start vLLM there, or say what to serve"
	# shellcheck disable=SC2016
	printf '%s %s %s\n' "${VLLM:-vllm}" \
		'serve "$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --served-model-name "$alias" --enable-sleep-mode' \
		"${ARGS:-}"
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
		[ -z "$slept" ] || canary
		rm -f "$sleep_file"
		say "is awake already"
		return
	fi
	if [ "$slept" = waking ]; then
		find_engine || fail "is half awake, after a wake that did not end: restart it"
		say "is half awake, after a wake that did not end: it is started anew"
		end_engine TERM "$GRACE" || end_engine KILL 10 || fail "process $pid does not end, even after KILL"
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
		step /reset_prefix_cache
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
