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
#   LOG_DIR       for its log, cut at LOG_MIB (64); before: .log.1       $PID_DIR
#   ASK_SECONDS   how long an answer may take                            5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with vLLM 0.32 on the CPU (make engines), and with a stand-in for its server (a real process with vLLM's HTTP
# API), under dash, bash and busybox, on Debian 12.

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

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy vllm-process' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/process.sh"

command_line() { # print the engine's command as shell words; the variables are filled in later, quoted
	[ -n "${MODEL:-}" ] || not_set_up "MODEL is not set: what to serve"
	# shellcheck disable=SC2016
	printf '%s %s %s\n' "${VLLM:-vllm}" \
		'serve "$MODEL" --host "${HOST:-127.0.0.1}" --port "$port" --served-model-name "$alias"' "${ARGS:-}"
}

is_ours() { answers_as "$alias"; }

is_ready() { is_healthy && is_ours; }

set_up "$@"
act "$@"
