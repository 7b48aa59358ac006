#!/bin/sh
# The hooks of engine.py: hook.sh wake|sleep|alive|verify|stop
#
# Needs: curl, setsid; for verify on a GPU nvidia-ml-py in $PYTHON.
# Environment: SIZE (8GiB), DEVICE (cuda), PYTHON (python3), RUN (a folder for process ids and logs, .run); LLMUX_* from
# llmux. Exit codes: 0 done, 1 failed, 2 wrong use.

set -u

here=$(cd "$(dirname "$0")" && pwd)
run=${RUN:-$here/.run}
python=${PYTHON:-python3}
pid_file=$run/$LLMUX_PORT.pid
mkdir -p "$run"

running() {
	pid=$(cat "$pid_file" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

post() {
	curl --silent --show-error --fail --max-time 600 --request POST "$LLMUX_URL/$1" >/dev/null
}

case ${1:-} in
wake)
	if ! running; then
		setsid "$python" "$here/engine.py" "$LLMUX_MODEL" "$LLMUX_PORT" --size "${SIZE:-8GiB}" \
			--device "${DEVICE:-cuda}" </dev/null >>"$run/$LLMUX_PORT.log" 2>&1 &
		echo $! >"$pid_file"
	fi
	until curl --silent --max-time 5 --output /dev/null "$LLMUX_URL/v1/models"; do
		running || {
			echo "the engine has ended; the end of $run/$LLMUX_PORT.log: $(tail -n 1 "$run/$LLMUX_PORT.log")" >&2
			exit 1
		}
		sleep 0.1
	done
	post wake
	;;
sleep)
	running || exit 0
	post sleep
	;;
alive)
	running && curl --silent --fail --max-time 5 --output /dev/null "$LLMUX_URL/health"
	;;
verify)
	"$python" "$here/verify.py" "${DEVICE:-cuda}" "${SIZE:-8GiB}"
	;;
stop)
	running || exit 0
	kill -KILL "$pid"
	while running; do sleep 0.05; done
	;;
*)
	echo "usage: hook.sh wake|sleep|alive|verify|stop" >&2
	exit 2
	;;
esac
