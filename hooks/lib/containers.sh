# shellcheck shell=sh
# An engine in a container. Uses $engine, the command that runs containers; $container, $name, $url, $health_path.

container() { # run the container engine, for $1 seconds at most: its daemon may hang
	limit=$1
	shift
	eval "set -- $engine \"\$@\""
	if has timeout; then
		timeout -k 5 "$limit" "$@"
	else
		"$@"
	fi
}

inspect() { container 20 inspect --type container --format "$1" "$container"; }

look() { # set $state to what the container does; "none" when there is no such container
	state=$(inspect '{{.State.Status}}' 2>/dev/null) && return
	state=$(inspect '{{.State.Status}}' 2>&1) # the complaint, which has no place beside an answer
	case $state in
	*[Nn]'o such container'* | *[Nn]'o such object'*) state=none ;; # not "no such file", of a socket
	*) fail "$engine cannot say what $container does: $state" ;;
	esac
}

is_up() { [ "$state" = running ] && is_healthy && expected; }

wait_ready() { # until it answers, or has ended
	strangers=0
	until look && is_up; do
		case $state in
		running)
			[ "$healthy" = no ] || strangers=$((strangers + 1))
			[ "$strangers" -lt 10 ] || fail "something answers at $url, but '$EXPECT' is not in what it says"
			;;
		created | restarting | starting | configured | initialized) ;;
		*)
			say "$container is $state while it starts; the end of its log:" >&2
			container 20 logs --tail 20 "$container" >&2
			exit 1
			;;
		esac
		sleep 0.2
	done
	say "$container is ready at $url"
}

start_container() { # whatever it takes to have it run
	tenths=100
	while [ "$state" = removing ] && [ "$tenths" -gt 0 ]; do # one that was stopped with --rm holds its name for a while
		tenths=$((tenths - 1))
		sleep 0.1
		look
	done
	case $state in
	running | restarting) ;;
	paused) container 60 unpause "$container" >/dev/null || fail "$container cannot be unpaused" ;;
	none)
		[ -n "${RUN:-}" ] || not_set_up "there is no container $container: create it," \
			"or set RUN to what comes after '$engine run --detach --name $container'"
		eval "set -- $RUN"
		container "${START_SECONDS:-900}" run --detach --name "$container" "$@" >/dev/null || fail "$container cannot be run"
		;;
	*) container "${START_SECONDS:-900}" start "$container" >/dev/null || fail "$container cannot be started" ;;
	esac
}

is_down() {
	look
	case $state in
	none | exited | created | dead | stopped | configured | initialized) ;;
	*) return 1 ;;
	esac
}

wait_down() {
	wait_for 100 is_down || fail "$container is still $state"
	say "$container is $state"
}

kill_container() {
	is_down || [ "$state" != paused ] || container 60 unpause "$container" >/dev/null
	is_down || container 60 kill "$container" >/dev/null || is_down || fail "$container cannot be killed"
	wait_down
}

stop_container() {
	if is_down; then
		say "$container is $state"
		return
	fi
	[ "$state" != paused ] || container 60 unpause "$container" >/dev/null # a frozen one hears no TERM
	container "$((${GRACE:-10} + 30))" stop -t "${GRACE:-10}" "$container" >/dev/null || fail "$container cannot be stopped"
	wait_down
}

wake_container() {
	look
	if is_up; then
		say "$container is awake already"
	else
		start_container
		wait_ready
	fi
}

set_up() { # with the script's arguments
	action=${1:-${LLMUX_HOOK:-}}
	[ -n "$container" ] || not_set_up "neither CONTAINER nor LLMUX_MODEL is set"
	case $container in
	[!A-Za-z0-9]* | *[!A-Za-z0-9_.-]*) not_set_up "'$container' can be no container's name: set CONTAINER" ;;
	esac
	[ -n "$url" ] || not_set_up "LLMUX_URL is not set"
	has "${engine%% *}" || not_set_up "no such program: ${engine%% *}"
	has curl || has python3 || has wget || not_set_up "needs curl, python3 or wget, to ask the engine"
}

act() { # in a script which has nothing to add
	case $action in
	wake) wake_container ;;
	sleep) stop_container ;;
	alive)
		look
		is_up || fail "$container is $state, and not ready at $url"
		;;
	stop) kill_container ;;
	verify) is_down || fail "$container is $state" ;;
	*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
	esac
}
