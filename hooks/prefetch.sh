#!/bin/sh
# prefetch: read the weights of the model that is about to wake into the page cache, while another one still drains.
#
#   models:
#     qwen:
#       prefetch: ./hooks/prefetch.sh
#       env: {MODEL: /models/qwen3-8b-q4_k_m.gguf}
#     vllm:
#       prefetch: ./hooks/prefetch.sh /models/llama-3.1-8b/*.safetensors
#
# It reads the files and folders that it is given, or else $MODEL; of a GGUF file in parts (…-00001-of-00003.gguf)
# all of them. It reads at the lowest priority for the processor, and for the disk where its scheduler knows any,
# so that the answers that are still being made do not notice. What would not fit into the memory that is
# available is not read: it would push out what others need. llmux ends it when its switch is over.
#
# Of no use to an engine that reads around the page cache (llama-server --direct-io), or that keeps the weights in
# its own memory while it sleeps (vLLM at level 1).
#
# Needs: cat, find, ls; ionice and renice are used where they are there.
#
# Environment
#   MODEL      a file or a folder; not needed when the command names any        none
#   KEEP_FREE  MiB of memory that are to stay available                         1024
#
# Exit codes: 0 read, or said why not; 1 reading failed; 2 not set up: nothing is named, or it is not there.
#
# Tested with files, folders, links and parts, under dash and bash, on Debian 12: tests/hooks.

set -u

say() { printf 'prefetch: %s\n' "$*"; }
not_set_up() { say "$@" >&2 && exit 2; }

case ${KEEP_FREE:=1024} in
*[!0-9]*) not_set_up "KEEP_FREE is no whole number: $KEEP_FREE" ;;
esac
[ $# -gt 0 ] || set -- "${MODEL:-}"
[ -n "$1" ] || not_set_up "MODEL is not set: the file or folder to read"
case $#$1 in
1*-00001-of-*.gguf) set -- "${1%-00001-of-*}"-[0-9][0-9][0-9][0-9][0-9]-of-"${1##*-of-}" ;;
esac
for path in "$@"; do
	[ -r "$path" ] || not_set_up "cannot be read: $path"
done

# Whatever is started from here on inherits both.
ionice -c 3 -p $$ >/dev/null 2>&1 || :
renice -n 19 -p $$ >/dev/null 2>&1 || :

mebibytes() { # print how large the files are, all together
	kibibytes=0
	find -L "$@" -type f -exec ls -lnL {} + | {
		while read -r _ _ _ _ size _; do
			kibibytes=$((kibibytes + (size + 1023) / 1024))
		done
		echo $(((kibibytes + 1023) / 1024))
	}
}

available() { # print the MiB of memory that can be had without swapping; fail where that is not known
	while read -r what figure _; do
		[ "$what" != MemAvailable: ] || echo $((figure / 1024))
	done </proc/meminfo 2>/dev/null
}

size=$(mebibytes "$@")
memory=$(available)
if [ -n "$memory" ] && [ "$size" -gt $((memory - KEEP_FREE)) ]; then
	say "not read: $size MiB, and $memory MiB of memory are available, of which $KEEP_FREE are to stay so"
	exit 0
fi
find -L "$@" -type f -exec cat {} + >/dev/null || exit 1
say "$size MiB read"
