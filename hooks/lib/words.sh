# shellcheck shell=sh
# What every script says, and how it waits. Uses $name: the model, unit or container that the script is about.

nl='
'
say() { printf '%s: %s\n' "$name" "$*"; }
fail() { say "$@" >&2 && exit 1; }
not_set_up() { say "$@" >&2 && exit 2; }
has() { command -v "$1" >/dev/null 2>&1; }

wait_for() { # run the rest, up to $1 tenths of a second, until it succeeds
	tenths=$1
	shift
	until "$@"; do
		[ "$tenths" -gt 0 ] || return 1
		tenths=$((tenths - 1))
		sleep 0.1
	done
}
