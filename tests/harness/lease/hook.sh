#!/bin/sh
# The hooks of the pretended engine: hook.sh wake|sleep|alive|verify|stop|prefetch
# $LAB is the laboratory's folder, $KEY a file-safe name of the model. Before it does its work each run executes
# $LAB/ctl/$KEY.$1, where a test has put one (with $LAB/ctl/$KEY.$1.n: that many times). Each run is journalled.
action=$1
run=$LAB/run/$KEY
log() { # by the clock that can be read without a program
    read -r now rest </proc/uptime
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$now" "$$" "$action" "$KEY" \
        "$LLMUX_MODEL" "$LLMUX_HOOK" "$LLMUX_PORT" "$LLMUX_URL" "$LLMUX_SWITCH_ID" "$LLMUX_FROM" "$LLMUX_TO" "$2" "$PWD" \
        >>"$LAB/hooks.tsv"
}
living() {
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
    case ${stat##*)} in " Z"* | " X"*) return 1 ;; esac
}
running() {
    if [ -e "$run.asked" ]; then # by a hook that has ended since, perhaps before it could say so
        echo "$run" >"$ENGINES"
        while [ -e "$run.asked" ]; do sleep 0.01; done
    fi
    pid=
    { read -r pid <"$run.pid"; } 2>/dev/null
    [ -n "$pid" ] || return 1
    living "$pid"
}
state() {
    word=
    { read -r word <"$run.state"; } 2>/dev/null
    [ "$word" = "$1" ]
}
log start -
trap 'log end $?' EXIT
before=$LAB/ctl/$KEY.$action
if [ -f "$before" ]; then
    left=1
    if [ -f "$before.n" ]; then
        read -r left <"$before.n"
        echo $((left - 1)) >"$before.n"
    fi
    if [ "$left" -gt 0 ]; then . "$before"; fi
fi
case $action in
wake)
    [ -z "$WAKE_DELAY" ] || sleep "$WAKE_DELAY"
    if running; then
        state awake || kill -USR2 "$pid"
    else
        rm -f "$run.pid" "$run.state"
        : >"$run.asked" # who ends this hook has to find the engine: it is gone when its number is written down
        printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$LLMUX_PORT" "$LAB" "$KEY" "${NAMES-$KEY}" \
            "${LEASE_CAPACITY:-1}" "${LEASE_SIZE:-1}" "${IDLE_CLOSE:-0}" "$run" >"$ENGINES"
        while [ -e "$run.asked" ]; do sleep 0.01; done
        running || exit 1
    fi
    until state awake; do
        sleep 0.01
        living "$pid" || exit 1
    done
    ;;
sleep)
    [ -z "$SLEEP_DELAY" ] || sleep "$SLEEP_DELAY"
    if ! running; then exit "${SLEEP_OF_DEAD:-0}"; fi
    if [ "$ENGINE" = stop ]; then
        kill -TERM "$pid"
        sleep 0.03
        while running; do sleep 0.01; done
    else
        state asleep || { kill -USR1 "$pid" && sleep 0.03; } # it sleeps a moment after the signal, even if it has been woken since
        until state asleep || ! running; do sleep 0.01; done
    fi
    ;;
alive)
    running && state awake
    ;;
verify)
    [ ! -e "$LAB/gpu/$KEY" ] || ! running
    ;;
stop)
    if running; then
        kill -KILL "$pid"
        while running; do sleep 0.01; done
    fi
    rm -f "$run.state"
    ;;
esac
