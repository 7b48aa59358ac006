#!/bin/sh
# verify: is the GPU's memory really free? It often is only some time after the engine has gone.
#
#   models:
#     qwen:
#       verify: ./hooks/gpu-free.sh
#       env: {MIN_FREE: "18000"}
#
# It looks once and exits; llmux asks again every half second until it succeeds or `timeouts.verify` is over. By
# hand, WAIT=30 ./hooks/gpu-free.sh asks for up to 30 seconds.
#
# Needs: nvidia-smi. Without it there is nothing to look at: it says so and succeeds.
#
# Environment
#   MIN_FREE   MiB that must be free on each GPU it looks at; with it, MAX_USED does not count   none
#   MAX_USED   MiB that may be in use; a desktop, or an engine asleep at vLLM's level 1, needs more   1024
#   GPUS       which GPUs, as for nvidia-smi --id                        $CUDA_VISIBLE_DEVICES, or all
#   WAIT       seconds to go on asking                                   0
#   DEADLINE   seconds for one answer of nvidia-smi, which hangs when the driver does                 10
#
# Exit codes: 0 free, or no nvidia-smi; 1 not free; 2 nvidia-smi failed, hung or reports no figures.
#
# Tested with stand-ins for nvidia-smi, under dash and bash, on Debian 12: tests/hooks.

set -u

gpus=${GPUS:-${CUDA_VISIBLE_DEVICES:-}}

ask() { # nvidia-smi with a deadline
	if command -v timeout >/dev/null 2>&1; then
		timeout -k 1 "${DEADLINE:-10}" nvidia-smi "$@"
	else
		nvidia-smi "$@"
	fi
}

look() { # 0: free; 1: not; 2: it cannot be told
	figures=$(ask ${gpus:+"--id=$gpus"} --query-gpu=index,memory.free,memory.used --format=csv,noheader,nounits) || {
		echo "nvidia-smi failed or did not answer: $figures"
		return 2
	}
	[ -n "$figures" ] || {
		echo "nvidia-smi names no GPU"
		return 2
	}
	echo "$figures" | {
		result=0
		while IFS=', ' read -r gpu free used; do
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
}

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
if [ "$result" -ne 0 ]; then
	echo "$said"
	echo "who holds memory (pid, MiB, program):"
	ask ${gpus:+"--id=$gpus"} --query-compute-apps=pid,used_memory,process_name --format=csv,noheader,nounits
fi >&2
exit "$result"
