#!/bin/sh
# NVIDIA Triton: the server runs all the time; a model of its repository is loaded to wake and unloaded to sleep.
#
#   models:
#     llama:
#       port: 9000                  # of the OpenAI front end, which answers clients
#       wake:   ./hooks/triton.sh wake
#       sleep:  ./hooks/triton.sh sleep
#       alive:  ./hooks/triton.sh alive
#       stop:   ./hooks/triton.sh stop
#       verify: ./hooks/gpu-free.sh
#       env: {NAME: ensemble, URL: "http://127.0.0.1:8000", STOP: docker restart triton}
#
# Start it with tritonserver --model-control-mode=explicit. The TensorRT-LLM backend has been seen to keep memory after
# unloading: with verify and stop, llmux finds out, and restarts the server.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    load the model and return when it is ready; if it is, nothing
#   sleep   unload it, with the models that an ensemble has loaded; return when no version of it is left
#   alive   succeed if it is ready
#   stop    run $STOP, for when unloading fails or frees nothing
#   verify  succeed if no version of it is loaded
#
# Needs: curl or python3.
#
# Environment
#   NAME           the model's name in the repository                   $LLMUX_MODEL
#   URL            Triton's own HTTP port (8000), where it is asked      $LLMUX_URL
#   DEPENDENTS     no: unload the model only, not what an ensemble has loaded with it        yes
#   LOAD_SECONDS   how long loading may take                            1500
#   GRACE          seconds that unloading may take                      60
#   STOP           a command that ends or restarts the server           none
#   ASK_SECONDS    how long an answer may take                           5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for Triton's HTTP API, under dash, bash and busybox, on Debian 12.

set -u

name=${LLMUX_MODEL:-}
model=${NAME:-$name}
url=${URL:-${LLMUX_URL:-}}

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy triton' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/remote.sh"

look() { # set $state: ready, unloaded, busy (loading or unloading), unknown; or refused when no server runs
	ask POST "$url/v2/repository/index" '{}' || {
		[ "$status" = refused ] || fail "Triton does not say what is loaded: $(answered)"
		state=refused
		return
	}
	# One object for each version that was ever loaded; without a state, it never was.
	state=$(printf '%s\n' "$answer" | tr -d '[:space:]' | WANTED="\"name\":$(json_text "$model")" awk '{
		count = split($0, part, /[}]/)
		said = "unknown"
		for (i = 1; i <= count; i++) {
			if (!index(part[i], ENVIRON["WANTED"])) continue
			if (part[i] ~ /"state":"(LOADING|UNLOADING)"/) { said = "busy"; break }
			if (part[i] ~ /"state":"READY"/) said = "ready"
			else if (said == "unknown") said = "unloaded"
		}
		print said
	}')
}

is_gone() {
	look
	case $state in
	unloaded | unknown | refused) ;;
	*) return 1 ;;
	esac
}

is_settled() {
	look
	[ "$state" != busy ]
}

order() { # load or unload, with a JSON body, in so many seconds
	ask POST "$url/v2/repository/models/$model/$1" "$2" "$3" || fail "$(answered)"
}

wake() {
	wait_for "$((${LOAD_SECONDS:-1500} * 10))" is_settled || fail "$model is still being loaded or unloaded"
	case $state in
	ready)
		say "is awake already"
		return
		;;
	refused) fail "nothing listens at $url: start Triton there" ;;
	unknown) not_set_up "Triton has no model $model in its repository (set NAME)" ;;
	esac
	order load '{}' "${LOAD_SECONDS:-1500}"
	ask GET "$url/v2/models/$model/ready" || fail "was loaded, but is not ready: $(answered)"
	say "$model is loaded"
}

go_to_sleep() {
	dependents=true
	[ "${DEPENDENTS:-yes}" = yes ] || dependents=false
	if ! is_gone; then
		wait_for "$((${GRACE:-60} * 10))" is_settled || fail "$model is still being loaded or unloaded"
		is_gone || order unload "{\"parameters\":{\"unload_dependents\":$dependents}}" 60
		wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still $state after ${GRACE:-60} s"
	fi
	say "$model is $state"
}

set_up "$@"

case $model in
*[!A-Za-z0-9._-]*) not_set_up "'$model' can be no model of Triton's: set NAME" ;;
esac

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
alive) ask GET "$url/v2/models/$model/ready" || fail "is not ready: $(answered)" ;;
stop)
	run_stop
	wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still $state"
	;;
verify) is_gone || fail "$model is $state" ;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
