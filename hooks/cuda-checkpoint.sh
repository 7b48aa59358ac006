#!/bin/sh
# Any CUDA process, whose GPU memory NVIDIA's cuda-checkpoint takes to the host's memory and back. Started if need be.
#
#   models:
#     qwen:
#       port: 8002
#       wake:   ./hooks/cuda-checkpoint.sh wake
#       sleep:  ./hooks/cuda-checkpoint.sh sleep
#       alive:  ./hooks/cuda-checkpoint.sh alive
#       stop:   ./hooks/cuda-checkpoint.sh stop
#       verify: ./hooks/gpu-free.sh
#       env:
#         COMMAND: 'vllm serve Qwen/Qwen3-8B --port "$LLMUX_PORT" --served-model-name "$LLMUX_MODEL"'
#         EXPECT: '"id":"qwen"'
#
# One GPU; no UVM and no memory shared between processes (CUDA IPC): engines that use these cannot be checkpointed. What
# is checkpointed goes on answering /health, for only its CUDA calls wait.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the command if it does not run; restore and unlock each of its CUDA processes; return when it is
#           ready; if it is already, nothing
#   sleep   lock each of its CUDA processes, then checkpoint them; if they are, nothing. If one cannot be locked, all are
#           unlocked and it runs on; if one cannot be checkpointed, it is of no more use: give `stop`
#   alive   succeed if none of them is locked or checkpointed, and it is ready
#   stop    KILL; return when all are gone
#   verify  succeed if all are checkpointed, or gone
#
# Needs: cuda-checkpoint, a driver from 570 on, x86-64; setsid or python3; one of curl, python3, wget; timeout.
#
# Environment
#   COMMAND       the command, as shell words; it stays in the foreground; required to start it
#   LLMUX_SLEEP_LEVEL   where llmux wants it, for a model with `levels`: stop (ended), or any other (checkpointed)
#   CUDA_CHECKPOINT   the program, as shell words: 'sudo cuda-checkpoint'           cuda-checkpoint
#   LOCK_SECONDS  how long a process may go on working before it is locked          30
#   STEP_SECONDS  how long one checkpoint or restore may take; with several GPUs it hangs           240
#   HEALTH_PATH   the path that answers 2xx once it is ready         /health
#   EXPECT        a text that only this server's answer contains     none
#   EXPECT_PATH   the path whose answer contains it                  /v1/models
#   LLMUX_MODEL, LLMUX_PORT, LLMUX_URL   given by llmux
#   PORT          where it listens                                   $LLMUX_PORT
#   URL           where it is asked                                  $LLMUX_URL, or http://127.0.0.1:$PORT
#   GRACE         seconds from TERM to the second TERM               20
#   PID_DIR       for the file that says which process it is         ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   LOG_DIR       for its log, cut at LOG_MIB (64); before: .log.1   $PID_DIR
#   ASK_SECONDS   how long an answer may take                        5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for cuda-checkpoint that keeps the states of real processes, under dash, bash and busybox, on
# Debian 12.

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

name=${LLMUX_MODEL:-}
port=${PORT:-${LLMUX_PORT:-}}
url=${URL:-${LLMUX_URL:-http://127.0.0.1:$port}}
health_path=${HEALTH_PATH:-/health}
tool=${CUDA_CHECKPOINT:-cuda-checkpoint}
GRACE=${GRACE:-20}

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy cuda-checkpoint' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/process.sh"

command_line() { # print the engine's command as shell words
	[ -n "${COMMAND:-}" ] || not_set_up "COMMAND is not set: the server to start"
	printf '%s\n' "$COMMAND"
}

is_ours() { find_engine && expected; }

is_ready() { is_healthy && is_ours; }

checkpoint() { # run cuda-checkpoint, for $1 seconds at most
	limit=$1
	shift
	eval "set -- $tool \"\$@\""
	timeout -k 5 "$limit" "$@"
}

members() { # the processes of the engine's session, without zombies of which no thread is left
	cat /proc/[0-9]*/stat 2>/dev/null | LEADER=$pid awk '{
		number = $1
		sub(/^.*\) /, "") # the name, which may hold spaces: what follows is state, parent, group, session
		if ($4 == ENVIRON["LEADER"] && ($1 != "Z" || $18 > 1)) print number
	}'
}

look() { # set $states: one pid:state for each process that uses CUDA. The others have no state.
	states=''
	for number in $(members); do
		if cuda_state=$(checkpoint "${ASK_SECONDS:-5}" --get-state --pid "$number" 2>/dev/null); then
			states="$states $number:$cuda_state"
		elif [ $? -ge 124 ]; then # of timeout: the driver hangs
			fail "$tool does not say within ${ASK_SECONDS:-5} s what process $number does"
		fi
	done
}

all_are() { # are there any, and are all in state $1?
	[ -n "$states" ] || return 1
	for entry in $states; do
		[ "${entry#*:}" = "$1" ] || return 1
	done
}

for_each() { # in state $1, do $2 (for $3 seconds at most); fail at the first that fails
	for entry in $states; do
		[ "${entry#*:}" = "$1" ] || continue
		process=${entry%%:*} from=$1 action_of_tool=$2 limit_of_tool=$3
		shift 3
		checkpoint "$limit_of_tool" --action "$action_of_tool" --pid "$process" "$@" || {
			say "process $process cannot be brought from $from to $action_of_tool" >&2
			return 1
		}
		set -- "$from" "$action_of_tool" "$limit_of_tool" "$@"
	done
}

wake() {
	if find_engine; then
		look
		case $states in
		*:failed*) fail "a checkpoint has failed, and its process is of no more use: sleep or stop ends it ($states)" ;;
		esac
		if [ -n "$states" ] && ! all_are running; then
			for_each checkpointed restore "${STEP_SECONDS:-240}" || exit 1
			look
			for_each locked unlock 30 || exit 1
			look
			all_are running || fail "was restored, but its processes are:$states"
			wait_for 300 is_ready || fail "was restored, but is not ready at $url"
			say "was restored"
			return
		fi
	fi
	wake_engine
}

go_to_sleep() {
	find_engine || nothing_runs || return 0
	if [ "${LLMUX_SLEEP_LEVEL:-}" = stop ]; then
		sleep_engine
		return
	fi
	look
	case $states in
	*:failed*) # of no more use, and what it holds is not known
		sleep_engine
		return
		;;
	esac
	if all_are checkpointed; then
		say "sleeps already"
		return
	fi
	if [ -z "$states" ]; then
		[ "$state" != ready ] || fail "none of its processes uses CUDA, or cuda-checkpoint may not look at them:" \
			"$(checkpoint "${ASK_SECONDS:-5}" --get-state --pid "$pid" 2>&1)"
		sleep_engine # it starts
		return
	fi
	for_each running lock "$((${LOCK_SECONDS:-30} + 10))" --timeout "$((${LOCK_SECONDS:-30} * 1000))" || {
		look
		for_each locked unlock 30
		fail "runs on: what it does takes longer than ${LOCK_SECONDS:-30} s"
	}
	look
	for_each locked checkpoint "${STEP_SECONDS:-240}" || fail "cannot be checkpointed: stop ends it"
	look
	all_are checkpointed || fail "was checkpointed, but its processes are:$states"
	say "sleeps"
}

set_up "$@"

has timeout || not_set_up "needs timeout: with several GPUs cuda-checkpoint hangs"
has "${tool%% *}" || not_set_up "no such program: ${tool%% *}"

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
stop) stop_engine ;;
alive)
	is_ready || fail "is not ready at $url"
	look
	[ -z "$states" ] || all_are running || fail "its processes are:$states"
	;;
verify)
	if find_engine; then
		look
		all_are checkpointed || fail "its processes are:$states"
	fi
	;;
become-engine)
	shift
	become_engine "$@"
	;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
