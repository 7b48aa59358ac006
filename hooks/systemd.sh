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

lib=$(readlink -f "$0" || echo "$0")
lib=${lib%/*}/lib
[ -r "$lib/words.sh" ] || {
	echo "$0: $lib is missing; 'llmux hooks copy systemd' writes a script that needs nothing beside it" >&2
	exit 2
}
. "$lib/words.sh"
. "$lib/http.sh"

systemd() {
	eval "set -- $systemctl \"\$@\""
	"$@"
}

property() { systemd show --property "$1" --value "$unit"; }

look() { # set $state to active, activating, deactivating, inactive, failed, …
	state=$(property ActiveState) || fail "$systemctl does not answer"
}

is_up() { [ "$state" = active ] && is_healthy && expected; }

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
			[ "$healthy" = no ] || strangers=$((strangers + 1))
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
	wait_for 100 is_down || fail "is still $state"
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
