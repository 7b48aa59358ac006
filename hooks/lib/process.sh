# shellcheck shell=sh
# An engine that is a process: started, found again by its pid file, ended. Uses $name, $port, $url, $health_path, and
# of the script's own functions command_line, is_ready and is_ours.

look_at() { # set $stat to what /proc has after the name of process $1: state, parent, group, session, …
	stat=''
	while read -r part; do stat=$part; done 2>/dev/null <"/proc/$1/stat" # a name may hold line ends
	stat=${stat##*) }
	[ -n "$stat" ]
}

born() { # print when a process was started: with its number, that tells it from any other, even after a reboot
	if [ -r /proc/self/stat ]; then
		look_at "$1" || return
		# shellcheck disable=SC2086 # fields: the 20th is the time
		set -- $stat
		echo "${20}-$boot"
	else
		ps -o lstart= -p "$1" 2>/dev/null | tr -s ' ' '-'
	fi
}

has_ended() { # is what was looked at a zombie of which no thread is left? Threads hold memory.
	# shellcheck disable=SC2086 # fields: the 18th is the number of threads
	set -- $stat
	[ "$1" = Z ] && [ "${18}" -le 1 ]
}

engine_runs() { # is the process of the pid file left, or one of its session? Sets $group: there may be several
	group=$pid
	leader=$(born "$pid")
	[ "${leader:-$started}" = "$started" ] || return 1 # its number has gone to another process
	if [ ! -r /proc/self/stat ]; then
		kill -0 "-$group" 2>/dev/null # this way dash, bash and busybox understand it
		return
	fi
	[ "${started#*-}" = "$boot" ] || return 1
	for process in "/proc/$pid" /proc/[0-9]*; do # the shell reads byte by byte: as few as it takes
		look_at "${process#/proc/}" || continue
		session=${stat#* * * }
		[ "${session%% *}" = "$pid" ] || continue # a job of a shell may have the number for its group, but not this
		group=${stat#* * }
		group=${group%% *}
		has_ended || return 0
	done
	return 1
}

engine_is_gone() { ! engine_runs; }

find_engine() { # read the pid file; fail if no process of that engine is left
	[ -r "$pid_file" ] && read -r pid started state <"$pid_file" && [ -n "$started" ] || return 1
	case $pid in
	'' | 0 | 1 | *[!0-9]*) return 1 ;;
	esac
	engine_runs
}

end_engine() { # send $1 to it and what it started, and wait up to $2 seconds for all to be gone
	signal=$1 told=''
	has_been_ended || wait_for "$(($2 * 10))" has_been_ended || return
	rm -f "$pid_file" || : # one that is left leads to no process
}

has_been_ended() { # as long as it is not, send $signal to the group that is left, once
	engine_runs || return 0
	told_now=-$group # or, where $leader_ends_all, TERM to it alone, while there is one
	[ "${leader_ends_all:-}.$signal.${process:-}" != "yes.TERM./proc/$pid" ] || told_now=$pid
	case $told in *" $told_now "*) return 1 ;; esac
	told="$told $told_now "
	kill "-$signal" "$told_now" 2>/dev/null
	kill -CONT "-$group" 2>/dev/null # a stopped one hears nothing else
	return 1
}

kill_engine() { end_engine KILL 10 || fail "process $pid does not end, even after KILL"; }

start_engine() { # in a session of its own: no signal that is meant for the hook reaches it, and all in it is the engine
	line=$(command_line) || exit
	eval "set -- $line"
	has "$1" || not_set_up "no such program: $1; ${0##*/} says in its first lines which variable names another"
	mkdir -p "$pid_dir" "$log_dir" || exit 2
	! has flock || { exec 9<"$pid_dir" && flock 9; } # of two wakes, one starts it
	find_engine || spawn_engine "$@"
	exec 9<&-
}

spawn_engine() { # $@, and wait for its pid file
	rm -f "$pid_file"
	[ ! -f "$log" ] || mv -f "$log" "$log.1"
	# This script itself writes the pid file and then becomes the engine: a hook that is killed leaves no orphan.
	if has setsid; then
		setsid sh "$0" become-engine "$@" </dev/null >>"$log" 2>&1 9<&- &
	elif has python3; then
		python3 -c 'import os, sys; os.setsid(); os.execvp("sh", sys.argv[1:])' \
			sh "$0" become-engine "$@" </dev/null >>"$log" 2>&1 9<&- &
	else
		not_set_up "needs setsid or python3, to detach the engine"
	fi
	tries=0
	until [ -f "$pid_file" ]; do
		tries=$((tries + 1))
		[ "$tries" -lt 1500 ] && kill -0 "$!" 2>/dev/null || [ -f "$pid_file" ] || fail "could not be started: see $log"
		sleep 0.02
	done
	read -r pid started state <"$pid_file"
	spawned=$!
}

has_failed() { # has the leader of one that starts ended, other than well? Its workers may live on, and wait for it
	[ "${process:-/proc/$pid}" != "/proc/$pid" ] && [ -z "$state" ] || return
	[ "$pid" = "$spawned" ] && wait "$pid" || return 0
	note daemon # another wake could not know that it ended well
	false
}

become_engine() {
	birth=$(born $$)
	[ -n "$birth" ] || not_set_up "needs /proc or ps, to tell the engine from others"
	echo "$$ $birth" >"$pid_file.$$" && mv -f "$pid_file.$$" "$pid_file" || exit 2
	exec "$@"
}

note() { # keep a word about the engine in its pid file
	echo "$pid $started $1" >"$pid_file.$$" && mv -f "$pid_file.$$" "$pid_file" || exit 1
	state=$1
}

speaks_http() { ask GET "$url/" || has_answered; }

wake_engine() { # is_ready has is_healthy ask first: an engine that starts is asked once each time, not twice
	if is_ready; then
		say "is awake already"
		return
	fi
	mine='' spawned=''
	if find_engine && { [ "$state" = ready ] || has_failed; }; then
		say "process $pid no longer answers; it is ended before a new one is started"
		end_engine TERM "${GRACE:-10}" || kill_engine
	fi
	strangers=0
	while :; do
		if find_engine && ! has_failed; then
			[ "$healthy" = no ] || strangers=$((strangers + 1))
			[ "$strangers" -lt 20 ] || fail "something answers at $url, but it is not $name"
		elif [ -n "$mine" ]; then
			say "ended while it was starting; the end of $log:" >&2
			tail -n 20 "$log" >&2
			end_engine TERM "${GRACE:-10}" || kill_engine
			exit 1
		elif [ "$healthy.$status" != no.refused ] && speaks_http; then
			is_ready || fail "something else answers at $url, not $name"
			break # others have started it, just now
		else
			mine=yes
			start_engine
		fi
		sleep 0.1
		! is_ready || break
	done
	if find_engine; then
		note ready
		say "process $pid is ready at $url"
	else
		say "is awake at $url; this script has not started it"
	fi
}

nothing_runs() { # what is left to say when the pid file leads to no process; it fails, too
	rm -f "$pid_file"
	! is_ours || fail "$url answers, but this script has not started what does: end it by hand"
	say "does not run"
	false
}

sleep_engine() {
	find_engine || nothing_runs || return 0
	end_engine TERM "${GRACE:-10}" || end_engine TERM 2 || kill_engine
	say "process $pid has ended"
}

stop_engine() {
	find_engine || nothing_runs || return 0
	kill_engine
	say "process $pid was killed"
}

is_odd() { case $name in *[!A-Za-z0-9._-]*) ;; *) false ;; esac }

take_over() { # files as the scripts named them before, where names could share one: whose it is, the engine was told
	if read -r pid _ <"$1.pid" && [ -r "/proc/$pid/environ" ]; then
		tr '\0' '\n' <"/proc/$pid/environ" | grep -qxF "LLMUX_MODEL=${LLMUX_MODEL:-}" || return 0
		mv -f "$1.pid" "$pid_dir/$file_name.pid"
		[ ! -f "$1.sleep" ] || mv -f "$1.sleep" "$pid_dir/$file_name.sleep"
	fi
}

set_up() { # with the script's arguments: from here on, the process can be looked for
	boot=''
	[ ! -r /proc/sys/kernel/random/boot_id ] || read -r boot </proc/sys/kernel/random/boot_id
	pid_dir=${PID_DIR:-${XDG_STATE_HOME:-${HOME:-/root}/.local/state}/llmux/engines}
	log_dir=${LOG_DIR:-$pid_dir} file_name=$name-$port
	if [ "${#name}" -gt 128 ] || is_odd; then
		plain=$(printf %s "$name" | tr -c 'A-Za-z0-9._-' _)
		sum=$(printf %s "$name" | cksum 2>/dev/null) || sum=$(printf %s "$name" | md5sum) # as some busybox
		file_name=$(printf '%.100s@%s' "$plain" "${sum%% *}")-$port # for each name another
		[ ! -f "$pid_dir/$plain-$port.pid" ] || take_over "$pid_dir/$plain-$port"
	fi
	pid_file=$pid_dir/$file_name.pid log=$log_dir/$file_name.log
	action=${1:-${LLMUX_HOOK:-}}

	[ -n "$name" ] || not_set_up "LLMUX_MODEL is not set"
	[ -n "$port" ] || not_set_up "LLMUX_PORT is not set"
	has curl || has python3 || has wget || not_set_up "needs curl, python3 or wget, to ask the engine"
	[ "$action" != alive ] || cut_log
}

cut_log() { # by what it takes on the disk: where an engine does not append, a log that was cut has a hole instead
	taken=$(du -m "$log" 2>/dev/null)
	[ "${taken%%[!0-9]*}" -gt "${LOG_MIB:-64}" ] 2>/dev/null && [ -w "$log" ] || return 0
	tail -c 1048576 "$log" >"$log.1"
	: >"$log" # even on a full disk, where nothing can be kept
}

act() { # with the script's arguments, in a script which has nothing to add
	case $action in
	wake) wake_engine ;;
	sleep) sleep_engine ;;
	stop) stop_engine ;;
	alive) is_ready || fail "is not ready at $url" ;;
	verify) ! find_engine || fail "process $pid is still there" ;;
	become-engine) shift && become_engine "$@" ;;
	*) not_set_up "usage: $0 wake|sleep|alive|stop|verify" ;;
	esac
}
