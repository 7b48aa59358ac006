# shellcheck shell=sh
# Asking a server over HTTP. Uses $url, where it is, $health_path, where it says that it is well,
# and $auth, a header with a key, where one is needed.

ask() { # METHOD URL [JSON] [SECONDS]: set $status and $answer, succeed on 2xx. No status: "refused", or "none" in time
	method=$1 address=$2 json=${3:-} seconds=${4:-${ASK_SECONDS:-5}}
	answer='' status=none code=0
	if has curl; then
		# A key goes through standard input: the list of processes shows none.
		set -- -sS --noproxy '*' --max-time "$seconds" -X "$method" -w '\n%{http_code}'
		[ -z "$json" ] || set -- "$@" -H 'Content-Type: application/json' --data-binary "$json"
		header=${auth:+header = $(json_text "$auth")}
		answer=$(
			curl -K - "$@" "$address" 2>/dev/null <<-END
				$header
			END
		) || code=$?
	elif has python3; then
		answer=$(AUTH=${auth:-} python3 -I -S -c 'import os, signal, sys, urllib.error as e, urllib.request as r
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
	took
}

took() { # set $status from $code, with which the program that asked has ended, and the last line of $answer
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

is_healthy() { # does it say that it is well? Sets $healthy to yes or no
	healthy=no
	# shellcheck disable=SC2034,SC2154 # of the scripts that use this function
	ask GET "$url$health_path" && healthy=yes
}

has_answered() { # has anything answered what was asked last, whatever it said?
	case $status in
	none | refused) return 1 ;;
	esac
}

answered() { # what it answered, in a line to be read
	case $status in
	refused) echo "nothing listens at $url" ;;
	none) echo "$address did not answer within $seconds s" ;;
	*) printf '%s\n' "$method ${address#"$url"} answers $status: $(printf %s "$answer" | tr '\n' ' ' | cut -c 1-300)" ;;
	esac
}

json_text() {
	case $1 in
	*[\\\"]*) printf '"%s"' "$(printf %s "$1" | sed 's/[\\"]/\\&/g')" ;;
	*) printf '"%s"' "$1" ;;
	esac
}

expected() { # does what answers say what only this server says? Without EXPECT there is nothing to go by.
	[ -n "${EXPECT:-}" ] || return 0
	ask GET "$url${EXPECT_PATH:-/v1/models}" || return 1
	case $answer in
	*"$EXPECT"*) ;;
	*) return 1 ;;
	esac
}

answers_as() { # does a server answer there which says that $1 is its model, and not another one?
	ask GET "$url/v1/models" || return 1
	said=\"$1\"
	case $1 in *[\\\"]*) said=$(json_text "$1") ;; esac # seldom: it takes a process
	case $answer in
	*"\"id\":$said"* | *"\"id\": $said"*) return ;;
	esac
	case $(printf %s "$answer" | sed 's/"[[:blank:]]*:[[:blank:]]*"/":"/g') in
	*"\"id\":$said"*) ;;
	*) return 1 ;;
	esac
}
