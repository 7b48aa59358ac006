#!/bin/sh
# Ollama: the server runs all the time; a model is loaded to wake and unloaded to sleep.
#
#   models:
#     llama3:
#       port: 11434
#       upstream_model: llama3.1:8b
#       wake:   ./hooks/ollama.sh wake
#       sleep:  ./hooks/ollama.sh sleep
#       alive:  ./hooks/ollama.sh alive
#       verify: ./hooks/gpu-free.sh
#       env: {NAME: llama3.1:8b}
#
# Run the server with OLLAMA_KEEP_ALIVE=-1: without it, Ollama itself unloads a model 5 minutes after the last request,
# whatever this script has asked for. Several models may be at its address, each with an `upstream_model`.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    load the model, without a prompt, and return when it is loaded; if it is, nothing
#   sleep   unload it and return when it is; if it is not loaded, nothing. Its memory may be freed a little later: verify
#   alive   succeed if it is loaded
#   stop    run $STOP, for when unloading fails; killing `ollama serve` has left the model's own process behind, with its
#           memory: systemctl restart ollama ends both
#   verify  succeed if it is not loaded
#
# Needs: curl or python3.
#
# Environment
#   NAME           what Ollama calls the model, as in `ollama list`     $LLMUX_MODEL
#   URL            where it is asked                                    $LLMUX_URL
#   LOAD_SECONDS   how long loading may take                            1500
#   GRACE          seconds that unloading may take                      60
#   STOP           a command that ends or restarts the server           none
#   ASK_SECONDS    how long an answer may take                          5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with Ollama 0.17.4 on the CPU (make engines), and with a stand-in for its HTTP API, under dash, bash and
# busybox, on Debian 12.

set -u

name=${LLMUX_MODEL:-}
model=${NAME:-$name}
url=${URL:-${LLMUX_URL:-}}

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy ollama' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/remote.sh"

case ${model##*/} in
*:*) tagged=$model ;;
*) tagged=$model:latest ;;
esac

look() { # set $state: loaded or unloaded; or refused when no server runs
	ask GET "$url/api/ps" || {
		[ "$status" = refused ] || fail "Ollama does not say what is loaded: $(answered)"
		state=refused
		return
	}
	listed=$(printf %s "$answer" | tr -d '[:space:]')
	case $listed in
	*"\"name\":$(json_text "$tagged")"* | *"\"name\":$(json_text "$model")"*) state=loaded ;;
	*) state=unloaded ;;
	esac
}

is_gone() {
	look
	[ "$state" != loaded ]
}

keep_alive() { # -1: load and keep; 0: unload
	if ! ask POST "$url/api/generate" "{\"model\":$(json_text "$model"),\"keep_alive\":$1,\"stream\":false}" "$2"; then
		case $status$answer in
		400*'does not support generate'*) # it makes embeddings
			ask POST "$url/api/embed" "{\"model\":$(json_text "$model"),\"input\":\"\",\"keep_alive\":$1}" "$2"
			;;
		*) return 1 ;;
		esac
	fi
}

on_gpu() { # say so when part of it had no room on the GPU
	printf '%s\n' "$listed" | WANTED=$(json_text "$tagged") awk '{
		count = split($0, part, /"name":/)
		for (i = 2; i <= count; i++) {
			if (index(part[i], ENVIRON["WANTED"]) != 1) continue
			size = vram = 0
			if (match(part[i], /"size":[0-9]+/)) size = substr(part[i], RSTART + 7, RLENGTH - 7)
			if (match(part[i], /"size_vram":[0-9]+/)) vram = substr(part[i], RSTART + 12, RLENGTH - 12)
			if (vram + 0 < size + 0) printf "only %d of %d MiB are on the GPU\n", vram / 1048576, size / 1048576
		}
	}'
}

wake() {
	look
	[ "$state" != refused ] || fail "nothing listens at $url: start Ollama there"
	if [ "$state" = loaded ]; then
		say "is awake already"
		return
	fi
	keep_alive -1 "${LOAD_SECONDS:-1500}" || {
		[ "$status" != 404 ] || not_set_up "Ollama has no model $model (set NAME, or ollama pull it): $(answered)"
		fail "$(answered)"
	}
	look
	[ "$state" = loaded ] || fail "Ollama said that $model is loaded, but does not list it"
	say "$model is loaded $(on_gpu)"
}

go_to_sleep() {
	if ! is_gone; then
		keep_alive 0 60 || fail "$(answered)"
		wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still loaded after ${GRACE:-60} s"
	fi
	say "$model is $state"
}

set_up "$@"

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
alive)
	look
	[ "$state" = loaded ] || fail "$model is $state"
	;;
stop)
	run_stop
	wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still loaded"
	;;
verify) is_gone || fail "$model is $state" ;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
