# shellcheck shell=sh
# An engine whose process stays when it sleeps. Uses $url, $alias and $health_path, and the script's own is_idle.

idle_soon() { wait_for "$((${GRACE:-10} * 10))" is_idle; } # wait for the last request to end

ask_token() { # ask for one token, or what $CANARY_JSON asks for
	question="{\"model\":$(json_text "$alias"),\"prompt\":\"The capital of France is\",\"max_tokens\":1,\"temperature\":0}"
	ask POST "$url${CANARY_PATH:-/v1/completions}" "${CANARY_JSON:-$question}" "${CANARY_SECONDS:-60}"
}

canary() { # has it come back with its senses?
	[ "${CANARY_PATH-yes}" ] || return 0
	ask_token || {
		case $status in
		4??) say "a model that does not complete text wants another CANARY_PATH and CANARY_JSON, or an empty CANARY_PATH" >&2 ;;
		esac
		fail "is awake, but does not answer: $(answered)"
	}
	case $answer in
	*"${CANARY_EXPECT:-}"*) ;;
	*) fail "is awake, but answers wrongly: '$CANARY_EXPECT' is not in its answer: $answer" ;;
	esac
}

not_hanging() { # a server that others have started: its silence is no proof that it has gone
	ask GET "$url$health_path"
	case $status in
	refused | 2??) ;; # nothing, or another server
	*) fail "this script has not started what is at $url, and it does not answer as it should: $(answered)" ;;
	esac
}

is_not_ours() { ! is_ours; }

stop_whatever() { # ours, or with $STOP what others have started
	if ! find_engine; then
		ask GET "$url$health_path"
		case $status in
		refused) ;;
		2??) ! is_ours || set -- foreign ;;
		*) set -- foreign ;;
		esac
	fi
	if [ $# -eq 0 ]; then
		stop_engine
		return
	fi
	[ -n "${STOP:-}" ] ||
		not_set_up "this script has not started what is at $url: set STOP to a command that ends it"
	say "runs: $STOP"
	sh -c "$STOP" </dev/null || fail "'$STOP' failed"
	wait_for "$((${GRACE:-10} * 10))" is_not_ours || fail "still answers, after '$STOP'"
}
