#!/bin/sh
# A systemd unit with any engine in it: started to wake, stopped to sleep.
#
#   models:
#     whisper:
#       port: 8005
#       wake:  ./hooks/systemd.sh wake
#       sleep: ./hooks/systemd.sh sleep
#       alive: ./hooks/systemd.sh alive
#       stop:  ./hooks/systemd.sh stop
#       env: {UNIT: whisper.service, SYSTEMCTL: systemctl --user, HEALTH_PATH: /}
#
# Do not enable the unit: llmux decides when it runs.
#
# Actions; without one, $LLMUX_HOOK says which.
#   wake    start the unit; return when it answers; if it does already, nothing
#   sleep   stop it, as long as its TimeoutStopSec allows; return when it is down
#   alive   succeed if it is active and answers
#   stop    KILL all of it; return when it is down
#   verify  succeed if it is down
#
# Needs: systemctl, and the right to start and stop the unit (a user's own, or a polkit rule, or sudo); one of curl,
# python3, wget.
#
# Environment
#   UNIT           its name                                             $LLMUX_MODEL
#   SYSTEMCTL      the command, as shell words: 'systemctl --user', 'sudo systemctl'         systemctl
#   HEALTH_PATH    the path that answers 2xx once it is ready           /health
#   EXPECT         a text that only this server's answer contains       none
#   EXPECT_PATH    the path whose answer contains it                    /v1/models
#   URL            where it is asked                                    $LLMUX_URL
#   ASK_SECONDS    how long an answer may take                          5
#
# Exit codes: 0 done; 1 failed, or not alive; 2 not set up: an action, a variable or a program is missing.
#
# Tested with a stand-in for systemctl that keeps its units' states, under dash, bash and busybox, on Debian 12.

# shellcheck disable=SC2119,SC2120 # functions set their arguments themselves
set -u

unit=${UNIT:-${LLMUX_MODEL:-}}
name=$unit
url=${URL:-${LLMUX_URL:-}}
systemctl=${SYSTEMCTL:-systemctl}
health_path=${HEALTH_PATH:-/health}

# ---- shared: expected
expected() { # does what answers say what only this server says? Without EXPECT there is nothing to go by.
	[ -n "${EXPECT:-}" ] || return 0
	served=$(get "$url${EXPECT_PATH:-/v1/models}") || return 1
	case $served in
	*"$EXPECT"*) ;;
	*) return 1 ;;
	esac
}
# ---- end of expected

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

systemd() {
	eval "set -- $systemctl \"\$@\""
	"$@"
}

property() { systemd show --property "$1" --value "$unit"; }

look() { # set $state to active, activating, deactivating, inactive, failed, …
	state=$(property ActiveState) || fail "$systemctl does not answer"
}

is_up() { [ "$state" = active ] && get "$url$health_path" >/dev/null && expected; }

is_down() {
	look
	case $state in
	inactive | failed) ;;
	*) return 1 ;;
	esac
}

wake() {
	look
	if is_up; then
		say "is awake already"
		return
	fi
	if [ "$state" != active ]; then
		[ "$(property LoadState)" != not-found ] || not_set_up "there is no unit $unit: set UNIT"
		[ "$state" != failed ] || systemd reset-failed "$unit"
		systemd start "$unit" || fail "cannot be started: $systemctl status $unit"
	fi
	restarts=$(property NRestarts)
	strangers=0
	until look && is_up; do
		case $state in
		active)
			! get "$url$health_path" >/dev/null || strangers=$((strangers + 1))
			[ "$strangers" -lt 10 ] || fail "something answers at $url, but '${EXPECT:-}' is not in what it says"
			;;
		activating | reloading) ;;
		*) fail "is $state while it starts ($(property Result)): $systemctl status $unit" ;;
		esac
		now=$(property NRestarts)
		[ "$((${now:-0} - ${restarts:-0}))" -lt 3 ] || fail "ends again and again while it starts: $systemctl status $unit"
		sleep 0.2
	done
	say "is ready at $url"
}

wait_down() {
	tenths=100
	until is_down; do
		[ "$tenths" -gt 0 ] || fail "is still $state"
		tenths=$((tenths - 1))
		sleep 0.1
	done
	say "is $state"
}

action=${1:-${LLMUX_HOOK:-}}
[ -n "$unit" ] || not_set_up "neither UNIT nor LLMUX_MODEL is set"
case $unit in
-* | *[!A-Za-z0-9:_.@\\-]*) not_set_up "'$unit' can be no unit's name: set UNIT" ;;
esac
[ -n "$url" ] || not_set_up "LLMUX_URL is not set"
has "${systemctl%% *}" || not_set_up "no such program: ${systemctl%% *}"
has curl || has python3 || has wget || not_set_up "needs curl, python3 or wget, to ask the engine"

case $action in
wake) wake ;;
sleep)
	is_down || systemd stop "$unit" || fail "cannot be stopped"
	wait_down
	;;
alive)
	look
	is_up || fail "is $state, and not ready at $url"
	;;
stop)
	is_down || {
		systemd kill --signal=KILL "$unit"
		systemd stop "$unit" || fail "cannot be stopped" # or Restart= brings it back
	}
	wait_down
	;;
verify) is_down || fail "is $state" ;;
*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
esac
