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
	refused) fail "nobody listens at $url: start Triton there" ;;
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
