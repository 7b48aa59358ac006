#!/bin/sh
# llama.cpp's llama-server: started to wake, ended to sleep.
#
#   models:
#     qwen:
#       port: 8001
#       wake:  ./hooks/llama-cpp.sh wake
#       sleep: ./hooks/llama-cpp.sh sleep
#       alive: ./hooks/llama-cpp.sh alive
#       stop:  ./hooks/llama-cpp.sh stop
#       env: {MODEL: /models/qwen3-8b-q4_k_m.gguf, CTX: "16384", ARGS: "--flash-attn on"}
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the server, detached, and return when it answers under its alias; if it does already, nothing
#   sleep   TERM, after $GRACE seconds a second TERM, 2 s later KILL; return when the process is gone: given
#           TERM in the middle of an answer, llama-server closes its port at once and lives on for 30 s
#   alive   succeed if the server is ready and answers under its alias
#   stop    KILL; return when the process is gone
#   verify  succeed if the process is gone
#
# Needs: llama-server; setsid or python3; one of curl, python3, wget.
#
# Environment
#   MODEL         the .gguf file; required to wake
#   LLAMA_SERVER  the command, as shell words                        llama-server
#   ARGS          more options for it, as shell words                none
#   CTX           context size                                       the server's own default
#   ALIAS         the name it answers under                          $LLMUX_MODEL
#   HOST, PORT    where it listens                                   127.0.0.1, $LLMUX_PORT
#   URL           where it is asked                                  $LLMUX_URL, or http://127.0.0.1:$PORT
#   GRACE         seconds from TERM to the second TERM               10
#   PID_DIR       for the file that says which process it is         ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   LOG_DIR       for its log, cut at LOG_MIB (64); before: .log.1   $PID_DIR
#   ASK_SECONDS   how long an answer may take                        5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with llama.cpp's server of October 2026 (CPU), under dash, bash and busybox, on Debian 12: tests/hooks.

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

name=${ALIAS:-${LLMUX_MODEL:-}}
alias=$name
port=${PORT:-${LLMUX_PORT:-}}
url=${URL:-${LLMUX_URL:-http://127.0.0.1:$port}}
health_path=/health

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy llama-cpp' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/process.sh"

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] || not_set_up "MODEL is not set: the .gguf file to serve"
	[ -r "$MODEL" ] || not_set_up "MODEL cannot be read: $MODEL"
	# shellcheck disable=SC2016
	printf '%s %s %s %s\n' "${LLAMA_SERVER:-llama-server}" \
		'--model "$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --alias "$alias"' \
		"${CTX:+--ctx-size \"\$CTX\"}" "${ARGS:-}"
}

is_ours() { answers_as "$alias"; }

is_ready() { is_healthy && is_ours; }

set_up "$@"
act "$@"
