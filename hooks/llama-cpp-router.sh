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
# Tested with a stand-in for the router's HTTP API, under dash, bash and busybox, on Debian 12.

set -u

name=${LLMUX_MODEL:-}
model=${NAME:-$name}
url=${URL:-${LLMUX_URL:-}}
auth=${API_KEY:+Authorization: Bearer $API_KEY}

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
	refused) fail "nobody listens at $url: start the router there" ;;
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
