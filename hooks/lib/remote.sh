# shellcheck shell=sh
# A server that runs all the time and loads and unloads its models by itself. Uses $name and $url.

run_stop() { # harder means, if the user gave any: the engine is a server that others have started
	[ -n "${STOP:-}" ] ||
		not_set_up "STOP is not set: a command that ends or restarts the server, for when unloading fails"
	say "runs: $STOP"
	sh -c "$STOP" </dev/null || fail "'$STOP' failed"
}

set_up() { # with the script's arguments
	action=${1:-${LLMUX_HOOK:-}}
	[ -n "$name" ] || not_set_up "LLMUX_MODEL is not set"
	[ -n "$url" ] || not_set_up "LLMUX_URL is not set"
	has curl || has python3 || not_set_up "needs curl or python3, to ask the engine"
}
