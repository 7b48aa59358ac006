#!/bin/sh
# Any server that is a process: started to wake, ended to sleep. For vLLM, SGLang, TabbyAPI, whisper servers and
# your own, where starting from nothing is good enough.
#
#   models:
#     whisper:
#       port: 8005
#       wake:  ./hooks/process.sh wake
#       sleep: ./hooks/process.sh sleep
#       alive: ./hooks/process.sh alive
#       stop:  ./hooks/process.sh stop
#       env: {COMMAND: 'whisper-server --host 127.0.0.1 --port "$LLMUX_PORT"', HEALTH_PATH: /}
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the command, detached, and return when it is ready; if it is already, nothing
#   sleep   TERM to it and what it started, $GRACE seconds later a second TERM, 2 s later KILL; return when all are gone.
#           With STOP_COMMAND, that first, and TERM when it has not helped within $GRACE seconds
#   alive   succeed if it is ready
#   stop    KILL; return when all are gone
#   verify  succeed if all are gone
#
# What it started is all that is in its session, in whatever process group; what begins a session is not found.
#
# Ready means: HEALTH_PATH answers 2xx, and EXPECT is found; without EXPECT, that our own process still runs.
#
# Needs: setsid or python3; one of curl, python3, wget.
#
# Environment
#   COMMAND       the command, as shell words; it stays in the foreground; required to wake
#   STOP_COMMAND  ends it, as `docker stop NAME`; may use $pid       none
#   FOLDER        where both commands run                            where the hooks do
#   HEALTH_PATH   the path that answers 2xx once it is ready;        /health
#                 `none`: any answer at all will do
#   EXPECT        a text that only this server's answer contains     none
#   EXPECT_PATH   the path whose answer contains it                  /v1/models
#   LLMUX_MODEL, LLMUX_PORT, LLMUX_URL   given by llmux
#   PORT          where it listens                                   $LLMUX_PORT
#   URL           where it is asked                                  $LLMUX_URL, or http://127.0.0.1:$PORT
#   GRACE         seconds from TERM to the second TERM               10
#   PID_DIR       for the file that says which process it is         ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   LOG_DIR       for its log, cut at LOG_MIB (64); before: .log.1   $PID_DIR
#   ASK_SECONDS   how long an answer may take                        5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with llama.cpp's server and a server that forks and ignores TERM, under dash, bash and busybox, on Debian 12.

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

name=${LLMUX_MODEL:-}
port=${PORT:-${LLMUX_PORT:-}}
url=${URL:-${LLMUX_URL:-http://127.0.0.1:$port}}
health_path=${HEALTH_PATH:-/health}
[ "$health_path" != none ] || health_path=/

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy process' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/process.sh"

command_line() { # print the engine's command as shell words
	[ -n "${COMMAND:-}" ] || not_set_up "COMMAND is not set: the server to start"
	# shellcheck disable=SC2016 # for later
	[ -z "${FOLDER:-}" ] || printf 'sh -c "$in_folder" sh '
	printf '%s\n' "$COMMAND"
}
# shellcheck disable=SC2016,SC2034
in_folder='cd "$FOLDER" && exec "$@"'

is_ours() { # does our server answer there, and not another one?
	if [ -n "${EXPECT:-}" ]; then
		expected
	else
		find_engine
	fi
}

is_ready() {
	is_healthy || { [ "${HEALTH_PATH:-}" = none ] && has_answered; } || return
	is_ours
}

run_stop_command() { (cd "${FOLDER:-.}" && eval "$STOP_COMMAND") </dev/null; }

ask_to_end() { # what STOP_COMMAND leaves is ended as without it
	if find_engine; then
		run_stop_command &
		wait_for "$((${GRACE:-10} * 10))" engine_is_gone
	else
		case $STOP_COMMAND in
		*[\$\{]pid*) ;;
		# A container may have outlived the process that started it. If there is none, this fails, and all is well.
		*) run_stop_command || : ;;
		esac
	fi
}

set_up "$@"

[ "$action" != sleep ] || [ -z "${STOP_COMMAND:-}" ] || ask_to_end

act "$@"
