#!/bin/sh
# llama.cpp's llama-server as a router: it runs all the time, and loads and unloads the models of a folder.
#
#   models:
#     qwen:
#       port: 8080
#       upstream_model: Qwen3-8B-Q4_K_M
#       wake:  ./hooks/llama-cpp-router.sh wake
#       sleep: ./hooks/llama-cpp-router.sh sleep
#       alive: ./hooks/llama-cpp-router.sh alive
#       env: {NAME: Qwen3-8B-Q4_K_M}
#
# Start it yourself, so that it loads nothing by itself:
#   llama-server --models-dir /models --models-max 1 --no-models-autoload --host 127.0.0.1 --port 8080
# Several models may be at its address, each with an `upstream_model`.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    load the model and return when it is loaded; if it is, nothing
#   sleep   unload it and return when it is; if it is not loaded, nothing. In the middle of an answer that takes long
#   alive   succeed if it is loaded
#   stop    run $STOP, for when unloading fails
#   verify  succeed if it is not loaded
#
# Needs: curl or python3.
#
# Environment
#   NAME       what the router calls the model                      $LLMUX_MODEL
#   API_KEY    the router's --api-key                               none
#   URL        where it is asked                                    $LLMUX_URL
#   GRACE      seconds that unloading may take                      60
#   STOP       a command that ends or restarts the router           none
#   ASK_SECONDS  how long an answer may take                        5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with llama.cpp's server of October 2026 on the CPU (make engines), and with a stand-in for the router's HTTP
# API, under dash, bash and busybox, on Debian 12.

set -u

name=${LLMUX_MODEL:-}
model=${NAME:-$name}
url=${URL:-${LLMUX_URL:-}}
auth=${API_KEY:+Authorization: Bearer $API_KEY}

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy llama-cpp-router' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/remote.sh"

look() { # set $state: loaded, loading, unloaded, sleeping, failed, unknown; or refused when no router runs
	ask GET "$url/models" || {
		[ "$status" = refused ] || fail "the router does not say what is loaded: $(answered)"
		state=refused
		return
	}
	# Of each model the id comes first, then what is loaded or not: {"data":[{"id":"…",…,"status":{"value":"…",…
	state=$(printf '%s\n' "$answer" | tr -d '[:space:]' | WANTED=$(json_text "$model" | tr -d '[:space:]') awk '{
		count = split($0, part, /"id":/)
		for (i = 2; i <= count; i++) {
			if (index(part[i], ENVIRON["WANTED"] ",") != 1) continue
			if (part[i] ~ /"failed":true/) said = "failed"
			else if (match(part[i], /"status":[{]"value":"[a-z]*"/)) {
				said = substr(part[i], RSTART + 19, RLENGTH - 20)
			}
		}
		print said == "" ? "unknown" : said
	}')
}

is_loaded() { [ "$state" = loaded ] || [ "$state" = sleeping ]; }

is_gone() {
	look
	case $state in
	unloaded | failed | unknown | refused) ;;
	*) return 1 ;;
	esac
}

wake() {
	look
	is_loaded && {
		say "is awake already"
		return
	}
	case $state in
	refused) fail "nothing listens at $url: start the router there" ;;
	unknown)
		known=$(printf '%s\n' "$answer" | tr ',{' "$nl$nl" | sed -n 's/^ *"id": *//p' | tr '\n' ' ')
		not_set_up "the router knows no model $model (set NAME); it has: $known"
		;;
	loading | downloading) ;;
	*) ask POST "$url/models/load" "{\"model\":$(json_text "$model")}" 60 || fail "$(answered)" ;;
	esac
	look
	until is_loaded; do
		case $state in
		loading | downloading) ;;
		*) fail "$model was not loaded, it is $state; the router's log says why" ;;
		esac
		sleep 0.1
		look
	done
	say "$model is loaded"
}

go_to_sleep() {
	if ! is_gone; then
		ask POST "$url/models/unload" "{\"model\":$(json_text "$model")}" 60 || is_gone || fail "$(answered)"
		wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still $state after ${GRACE:-60} s"
	fi
	say "$model is $state"
}

set_up "$@"

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
alive)
	look
	is_loaded || fail "$model is $state"
	;;
stop)
	run_stop
	wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still $state"
	;;
verify) is_gone || fail "$model is $state" ;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
