#!/bin/sh
# verify: is the GPU's memory really free? It often is only some time after the engine has gone.
#
#   models:
#     qwen:
#       verify: ./hooks/gpu-free.sh
#       env: {MIN_FREE: "18000"}
#
# It looks once and exits; llmux asks again every half second until it succeeds or `timeouts.verify` is over. By
# hand, WAIT=30 ./hooks/gpu-free.sh asks for up to 30 seconds. It looks at two things: what is free or in use on the
# GPU, and what the engine's own processes still hold there, where it knows them.
#
# Needs: nvidia-smi. Without it, or without a GPU, there is nothing to look at: it says so and succeeds.
#
# Environment
#   MIN_FREE   MiB that must be free on each GPU it looks at; with it, MAX_USED does not count   none
#   MAX_USED   MiB that may be in use; a desktop, or an engine asleep at vLLM's level 1, needs more   1024
#   OWN_MAX    MiB that each process of the engine may still hold, as one that sleeps does   1024
#   PIDS       the engine's processes, with commas      those of the pid file that llmux's scripts keep in PID_DIR
#   PID_DIR    where that is                            ${XDG_STATE_HOME:-~/.local/state}/llmux/engines
#   PORT       a part of its name                       $LLMUX_PORT
#   ALIAS, LLMUX_MODEL   another part of its name: the first with which there is a file
#   GPUS       which GPUs, as for nvidia-smi --id, or MIG-… devices      $CUDA_VISIBLE_DEVICES, or all
#   WAIT       seconds to go on asking                                   0
#   DEADLINE   seconds for one answer of nvidia-smi, which hangs when the driver does                 10
#
# On a GPU that is divided by MIG, its MIG devices are looked at, each for itself. In a container, nvidia-smi knows the
# processes by other numbers than the engine does, or not at all: then only the GPU's own figures count.
#
# Exit codes: 0 free, or no nvidia-smi, or no GPU; 1 not free; 2 nvidia-smi failed, hung or reports no figures.
#
# Tested with stand-ins for nvidia-smi, under dash and bash, on Debian 12: tests/hooks. MIG: only with a stand-in.

set -u

gpus=${GPUS:-${CUDA_VISIBLE_DEVICES:-}}

ask() { # nvidia-smi with a deadline
	if command -v timeout >/dev/null 2>&1; then
		timeout -k 1 "${DEADLINE:-10}" nvidia-smi "$@"
	else
		nvidia-smi "$@"
	fi
}

query_gpus() {
	ask ${gpus:+"--id=$gpus"} "--query-gpu=index,memory.free,memory.used$1" --format=csv,noheader,nounits
}

whole_gpus() { # GPU free used, a line for each; those that MIG divides are said to be so
	figures=$(query_gpus ,mig.mode.current) || {
		case $figures in
		*'not a valid field'*) figures=$(query_gpus '') ;; # a driver that does not know MIG
		*) false ;;
		esac
	} || {
		case $figures in
		*[Nn]'o devices were found'*) return 3 ;;
		esac
		echo "nvidia-smi failed or did not answer: $figures"
		return 2
	}
	case $figures in
	'')
		echo "nvidia-smi names no GPU"
		return 2
		;;
	*[Nn]'o devices were found'*) return 3 ;;
	esac
	printf '%s\n' "$figures" | while IFS=', ' read -r gpu free used mig; do
		case $mig in
		Enabled) echo "divided $gpu" ;;
		*) echo "$gpu $free $used" ;;
		esac
	done
}

mig_devices() { # GPU.DEVICE free used, a line for each: of GPU $1, or of all those that are in $gpus
	listed=$(ask -L) || return 2
	report=$(ask --query) || return 2
	# The devices' names stand in one, their memory in the other, both in the same order.
	printf '%s\n----\n%s\n' "$listed" "$report" | GPU=${1:-} WANTED=",$gpus," awk '
		/^----$/ { second = 1; next }
		!second && /^GPU / { gpu = $2; sub(/:/, "", gpu) }
		!second && /^ +MIG / {
			device = $0; sub(/.*Device +/, "", device); sub(/:.*/, "", device)
			uuid = $0; sub(/.*UUID: */, "", uuid); sub(/\).*/, "", uuid)
			count++; on[count] = gpu; label[count] = gpu "." device; id[count] = uuid
		}
		!second { next }
		{ match($0, /[^ ]/); indent = RSTART }
		/^ +MIG Device *$/ { at++; margin = indent; inside = at; memory = 0; next }
		inside && indent <= margin { inside = 0 }
		inside && /FB Memory Usage/ { memory = 1 }
		inside && /BAR1 Memory Usage/ { memory = 0 }
		inside && memory && /Used +:/ { used[at] = $(NF - 1) }
		inside && memory && /Free +:/ { free[at] = $(NF - 1) }
		END {
			for (i = 1; i <= count; i++)
				if (ENVIRON["GPU"] != "" ? on[i] == ENVIRON["GPU"] : index(ENVIRON["WANTED"], "," id[i] ","))
					print label[i], free[i] == "" ? "none" : free[i], used[i] == "" ? "none" : used[i]
		}'
}

own_pids() { # the engine's processes, a line each
	if [ -n "${PIDS:-}" ]; then
		printf '%s\n' "$PIDS" | tr -s ', ' '[\n*]'
		return
	fi
	folder=${PID_DIR:-${XDG_STATE_HOME:-${HOME:-/root}/.local/state}/llmux/engines}
	leader=''
	for name in "${ALIAS:-}" "${LLMUX_MODEL:-}"; do
		file=$(printf %s "$name" | tr -c 'A-Za-z0-9._-' _)
		if [ "$file" != "$name" ] || [ "${#name}" -gt 128 ]; then # as lib/process.sh calls it
			sum=$(printf %s "$name" | cksum 2>/dev/null) || sum=$(printf %s "$name" | md5sum)
			file=$(printf '%.100s@%s' "$file" "${sum%% *}")
		fi
		file=$folder/$file-${PORT:-${LLMUX_PORT:-}}.pid
		[ -n "$leader" ] || [ ! -r "$file" ] || read -r leader _ <"$file"
	done
	[ -n "$leader" ] || return 0
	cat /proc/[0-9]*/stat 2>/dev/null | LEADER=$leader awk '{
		number = $1
		sub(/^.*\) /, "") # the name, which may hold spaces: what follows is state, parent, group, session
		if ($4 == ENVIRON["LEADER"]) print number
	}'
}

own_processes_are_small() { # what the engine's processes hold; what has no figure is left to the GPU's figures
	own=$(own_pids)
	[ -n "$own" ] || return 0
	apps=$(ask --query-compute-apps=pid,used_memory --format=csv,noheader,nounits) || {
		echo "nvidia-smi failed or did not answer: $apps"
		return 2
	}
	printf '%s\n' "$apps" | {
		result=0
		while IFS=', ' read -r pid used; do
			case $used in
			'' | *[!0-9]*) continue ;;
			esac
			case "$nl$own$nl" in
			*"$nl$pid$nl"*) ;;
			*) continue ;;
			esac
			[ "$used" -gt "${OWN_MAX:-1024}" ] || continue
			echo "process $pid of the engine holds $used MiB, ${OWN_MAX:-1024} allowed"
			result=1
		done
		exit "$result"
	}
}

judge() { # of the lines GPU free used: 0: free; 1: not; 2: it cannot be told
	result=0
	while read -r gpu free used; do
		case $free$used in
		*[!0-9]* | '')
			echo "GPU $gpu: no figures: free '$free', used '$used'"
			exit 2
			;;
		esac
		if [ -n "${MIN_FREE:-}" ]; then
			[ "$free" -lt "$MIN_FREE" ] || continue
			echo "GPU $gpu: $free MiB free, $MIN_FREE needed"
		else
			[ "$used" -gt "${MAX_USED:-1024}" ] || continue
			echo "GPU $gpu: $used MiB in use, ${MAX_USED:-1024} allowed"
		fi
		result=1
	done
	exit "$result"
}

each_one() { # GPU free used, a line for each GPU or MIG device
	case $gpus in
	*MIG-*)
		mig_devices
		return
		;;
	esac
	found=$(whole_gpus) || {
		result=$?
		echo "$found"
		return "$result"
	}
	printf '%s\n' "$found" | while read -r gpu free used; do
		case $gpu in
		divided) mig_devices "$free" ;;
		*) echo "$gpu $free $used" ;;
		esac
	done
}

look() { # 0: free; 1: not; 2: it cannot be told; 3: there is no GPU
	lines=$(each_one) || {
		result=$?
		echo "${lines:-nvidia-smi failed or did not answer}"
		return "$result"
	}
	[ -n "$lines" ] || {
		echo "nvidia-smi knows none of these${gpus:+: $gpus}"
		return 2
	}
	printf '%s\n' "$lines" | (judge)
	result=$?
	said_of_own=$(own_processes_are_small)
	own_result=$?
	[ -z "$said_of_own" ] || echo "$said_of_own"
	[ "$own_result" -le "$result" ] || result=$own_result
	return "$result"
}

nl='
'
command -v nvidia-smi >/dev/null 2>&1 || {
	echo "no nvidia-smi here: nothing to look at"
	exit 0
}

seconds=${WAIT:-0}
while :; do
	said=$(look 2>&1)
	result=$?
	[ "$result" -eq 1 ] && [ "$seconds" -gt 0 ] || break
	seconds=$((seconds - 1))
	sleep 1
done
case $result in
0) exit 0 ;;
3)
	echo "no GPU here: nothing to look at"
	exit 0
	;;
esac
{
	echo "$said"
	echo "what holds memory (pid, MiB, program):"
	ask --query-compute-apps=pid,used_memory,process_name --format=csv,noheader,nounits
} >&2
exit "$result"
