#!/bin/sh
# vLLM as a process: started to wake, ended to sleep. For vLLM that stays and gives its memory back, vllm-sleep.
#
#   models:
#     qwen:
#       port: 8002
#       wake:  ./hooks/vllm-process.sh wake
#       sleep: ./hooks/vllm-process.sh sleep
#       alive: ./hooks/vllm-process.sh alive
#       stop:  ./hooks/vllm-process.sh stop
#       env: {MODEL: Qwen/Qwen3-8B, ARGS: "--max-model-len 16384"}
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the server, detached, and return when it answers under its name; if it does already, nothing
#   sleep   TERM to it and its workers, after $GRACE seconds a second TERM, 2 s later KILL; return when all are gone
#   alive   succeed if the server is ready and answers under its name
#   stop    KILL; return when all are gone
#   verify  succeed if all are gone
#
# Needs: vllm; setsid or python3; one of curl, python3, wget; with API_KEY curl or python3.
#
# Environment
#   MODEL         what to serve: a name on Hugging Face, or a folder; required to wake
#   VLLM          the command, as shell words; it gets `serve MODEL …`   vllm
#   ARGS          more options for it, as shell words                    none
#   ALIAS         the name it answers under                              $LLMUX_MODEL
#   API_KEY       its key; reaches it as VLLM_API_KEY                    none
#   HOST, PORT    where it listens                                       127.0.0.1, $LLMUX_PORT
#   URL           where it is asked                                      $LLMUX_URL, or http://127.0.0.1:$PORT
#   GRACE         seconds from TERM to the second TERM                   20
#   PID_DIR       for the file that says which process it is             ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   LOG_DIR       for its log; the one before is kept as .log.1          $PID_DIR
#   ASK_SECONDS   how long an answer may take                            5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for vLLM's server (a real process with vLLM's HTTP API), under dash, bash and busybox, on
# Debian 12. Not with vLLM itself.

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

name=${LLMUX_MODEL:-}
alias=${ALIAS:-$name}
port=${PORT:-${LLMUX_PORT:-}}
url=${URL:-${LLMUX_URL:-http://127.0.0.1:$port}}
health_path=/health
auth=${API_KEY:+Authorization: Bearer $API_KEY}
GRACE=${GRACE:-20}
[ -z "${API_KEY:-}" ] || export VLLM_API_KEY="$API_KEY"

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] || not_set_up "MODEL is not set: what to serve"
	# shellcheck disable=SC2016
	printf '%s %s %s\n' "${VLLM:-vllm}" \
		'serve "$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --served-model-name "$alias"' "${ARGS:-}"
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

# ---- shared: actions of a process
case $action in
wake) wake_engine ;;
sleep) sleep_engine ;;
stop) stop_engine ;;
alive) is_ready || fail "is not ready at $url" ;;
verify) ! find_engine || fail "process $pid is still there" ;;
become-engine)
	shift
	become_engine "$@"
	;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
# ---- end of actions of a process
