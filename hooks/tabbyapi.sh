#!/bin/sh
# TabbyAPI (ExLlama): the server runs all the time; its one model is loaded to wake and unloaded to sleep.
#
#   models:
#     llama3:
#       port: 5000
#       shared_address: true        # if other models take turns on this server
#       upstream_model: Llama-3.1-8B-exl3
#       wake:   ./hooks/tabbyapi.sh wake
#       sleep:  ./hooks/tabbyapi.sh sleep
#       alive:  ./hooks/tabbyapi.sh alive
#       verify: ./hooks/gpu-free.sh
#       env: {NAME: Llama-3.1-8B-exl3, ADMIN_KEY: "${TABBY_ADMIN_KEY}"}
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    load the model and return when it is loaded; if it is, nothing
#   sleep   unload it; if it is not loaded, or another one is, nothing. Requests that are under way are cut
#   alive   succeed if it is loaded
#   stop    run $STOP, for when unloading fails
#   verify  succeed if it is not loaded
#
# Needs: curl or python3.
#
# Environment
#   NAME           the folder of the model among TabbyAPI's models      $LLMUX_MODEL
#   ADMIN_KEY      the admin_key of its api_tokens.yml; without it only with disable_auth            none
#   OPTIONS        more of the loading request, as JSON fields: '"max_seq_len": 8192'                none
#   URL            where it is asked                                    $LLMUX_URL
#   LOAD_SECONDS   how long loading may take                            1500
#   GRACE          seconds that unloading may take                      60
#   STOP           a command that ends or restarts the server           none
#   ASK_SECONDS    how long an answer may take                          5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for TabbyAPI's HTTP API, under dash, bash and busybox, on Debian 12.

set -u

name=${LLMUX_MODEL:-}
model=${NAME:-$name}
url=${URL:-${LLMUX_URL:-}}
auth=${ADMIN_KEY:+x-admin-key: $ADMIN_KEY}

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy tabbyapi' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"
. "$lib/remote.sh"

refused_key() {
	case $status in
	401 | 403) not_set_up "TabbyAPI refuses the key: ADMIN_KEY is the admin_key of its api_tokens.yml" ;;
	esac
}

look() { # set $state: loaded, unloaded, other (another one is loaded); or refused when no server runs
	if ask GET "$url/v1/model"; then
		case $(printf %s "$answer" | tr -d '[:space:]') in
		*"\"id\":$(json_text "$model" | tr -d '[:space:]')"*) state=loaded ;;
		*) state=other ;;
		esac
		return
	fi
	refused_key
	case $status in
	refused) state=refused ;;
	400 | 404 | 503) state=unloaded ;; # that is how it says that nothing is loaded
	*) fail "TabbyAPI does not say what is loaded: $(answered)" ;;
	esac
}

is_gone() {
	look
	[ "$state" != loaded ]
}

wake() {
	look
	case $state in
	loaded)
		say "is awake already"
		return
		;;
	refused) fail "nothing listens at $url: start TabbyAPI there" ;;
	esac
	ask POST "$url/v1/model/load" "{\"model_name\":$(json_text "$model")${OPTIONS:+,$OPTIONS}}" "${LOAD_SECONDS:-1500}" || {
		refused_key
		fail "$(answered)"
	}
	# It answers 200 at once, then with events: what went wrong is said in one of them.
	case $(printf %s "$answer" | tr -d '[:space:]') in
	*'"error":'*) fail "$model was not loaded: $(answered)" ;;
	esac
	look
	[ "$state" = loaded ] || fail "$model was not loaded, although TabbyAPI named no error"
	say "$model is loaded"
}

go_to_sleep() {
	if ! is_gone; then
		ask POST "$url/v1/model/unload" '' "${GRACE:-60}" || {
			refused_key
			is_gone || fail "$(answered)"
		}
		wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still loaded after ${GRACE:-60} s"
	fi
	case $state in
	other) say "$model is not loaded; another model is" ;;
	*) say "$model is $state" ;;
	esac
}

set_up "$@"

case $action in
wake) wake ;;
sleep) go_to_sleep ;;
alive)
	look
	[ "$state" = loaded ] || fail "$model is not loaded ($state)"
	;;
stop)
	run_stop
	wait_for "$((${GRACE:-60} * 10))" is_gone || fail "$model is still loaded"
	;;
verify) is_gone || fail "$model is loaded" ;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
