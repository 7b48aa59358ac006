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

# ---- shared: words
nl='
'
say() { printf '%s: %s\n' "$name" "$*"; }
fail() { say "$@" >&2 && exit 1; }
not_set_up() { say "$@" >&2 && exit 2; }
has() { command -v "$1" >/dev/null 2>&1; }
# ---- end of words

# ---- shared: http
ask() { # METHOD URL [JSON] [SECONDS]: set $status and $answer, succeed on 2xx. No status: "refused", or "none" in time
	method=$1 address=$2 json=${3:-} seconds=${4:-${ASK_SECONDS:-5}}
	answer='' status=none code=0
	if has curl; then
		# A key goes through standard input: the list of processes shows none.
		set -- -sS --noproxy '*' --max-time "$seconds" -X "$method" -w '\n%{http_code}'
		[ -z "$json" ] || set -- "$@" -H 'Content-Type: application/json' --data-binary "$json"
		answer=$(printf '%s\n' "${auth:+header = $(json_text "$auth")}" | curl -K - "$@" "$address" 2>/dev/null) || code=$?
	elif has python3; then
		answer=$(AUTH=${auth:-} python3 -c 'import os, signal, sys, urllib.error as e, urllib.request as r
method, url, body, seconds = sys.argv[1:]
signal.setitimer(signal.ITIMER_REAL, float(seconds))
request = r.Request(url, body.encode() or None, method=method)
name, _, value = os.environ["AUTH"].partition(": ")
for name, value in ((name, value), ("Content-Type", body and "application/json")):
    if value: request.add_header(name, value)
try:
    with r.build_opener(r.ProxyHandler({})).open(request) as reply: code, text = reply.status, reply.read()
except e.HTTPError as error: code, text = error.code, error.read()
except e.URLError as error: sys.exit(7 if isinstance(error.reason, ConnectionRefusedError) else 1)
sys.stdout.buffer.write(text + b"\n%d" % code)' "$method" "$address" "$json" "$seconds" 2>/dev/null) || code=$?
	elif [ "$method" = GET ] && [ -z "${auth:-}" ]; then # with wget, whatever is no success is a 500
		if answer=$(wget -q -O - -T "$seconds" "$address" 2>/dev/null); then
			answer=$answer${nl}200
		elif wget -S -O /dev/null -T "$seconds" "$address" 2>&1 | grep -q HTTP/; then
			answer=${nl}500
		else
			code=1
		fi
	else
		not_set_up "needs curl or python3, to tell the engine what to do"
	fi
	case $code in
	0) status=${answer##*"$nl"} answer=${answer%"$nl"*} ;;
	7) status=refused answer='' ;;
	*) answer='' ;;
	esac
	case $status in
	2??) ;;
	*) return 1 ;;
	esac
}

get() { ask GET "$1" && printf '%s\n' "$answer"; }

speaks_http() { # does anything answer there, whatever it says?
	ask GET "$url/" && return
	case $status in
	none | refused) return 1 ;;
	esac
}

answered() { # what it answered, in a line for people
	case $status in
	refused) echo "nobody listens at $url" ;;
	none) echo "$address did not answer within $seconds s" ;;
	*) printf '%s\n' "$method ${address#"$url"} answers $status: $(printf %s "$answer" | tr '\n' ' ' | cut -c 1-300)" ;;
	esac
}

json_text() { printf '"%s"' "$(printf %s "$1" | sed 's/[\\"]/\\&/g')"; }
# ---- end of http

# ---- shared: remote
run_stop() { # harder means, if the user gave any: the engine is a server that others have started
	[ -n "${STOP:-}" ] ||
		not_set_up "STOP is not set: a command that ends or restarts the server, for when unloading fails"
	say "runs: $STOP"
	sh -c "$STOP" </dev/null || fail "'$STOP' failed"
}

wait_for() { # run the rest, up to $1 tenths of a second, until it succeeds
	tenths=$1
	shift
	until "$@"; do
		[ "$tenths" -gt 0 ] || return 1
		tenths=$((tenths - 1))
		sleep 0.1
	done
}

action=${1:-${LLMUX_HOOK:-}}
[ -n "$name" ] || not_set_up "LLMUX_MODEL is not set"
[ -n "$url" ] || not_set_up "LLMUX_URL is not set"
has curl || has python3 || not_set_up "needs curl or python3, to ask the engine"
# ---- end of remote

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
	refused) fail "nobody listens at $url: start TabbyAPI there" ;;
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
