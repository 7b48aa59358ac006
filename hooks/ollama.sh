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
# Tested with a stand-in for Ollama's HTTP API, under dash, bash and busybox, on Debian 12.

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
	[ "$state" != refused ] || fail "nobody listens at $url: start Ollama there"
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
