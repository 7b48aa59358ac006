"""Every event of the log: its name, its level, its meaning.

The names and fields that the original had are kept: ``switch_started`` (from, to), ``model_activated`` (model,
from, duration_secs), ``switch_failed`` (model, from, error), ``sleep_hook_failed`` (model, to, error),
``request_timeout`` (model, timeout_secs), ``hook_completed`` and ``hook_failed`` (model, hook, exit_code,
duration_secs, stderr).
"""

from __future__ import annotations

import logging
from typing import NamedTuple

_DEBUG, _INFO, _WARNING, _ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


class LogEvent(NamedTuple):
    """How loud an event is, and what it means."""

    level: int
    meaning: str


CATALOGUE: dict[str, LogEvent] = {
    # start, stop, configuration
    "started": LogEvent(
        _INFO, "llmux listens: where, which clients may operate it, and which event loop runs (uvloop or asyncio)."
    ),
    "control_socket_unavailable": LogEvent(
        _WARNING, "The llmux command on this host has no socket to come by: it takes the way over TCP."
    ),
    "listening_on_loopback": LogEvent(_INFO, "Only this machine can connect; says how to open llmux to others."),
    "open_files_limit": LogEvent(_INFO, "The limit on open files was raised, or could not be."),
    "ready": LogEvent(_INFO, "Every model's first `alive` has ended; `adopted` were found running."),
    "stopping": LogEvent(_INFO, "A signal came: nothing new is admitted, what runs may finish."),
    "stopped": LogEvent(_INFO, "Nothing is in flight and no hook runs; llmux exits."),
    "config_reloaded": LogEvent(_INFO, "A new configuration is in force."),
    "config_rejected": LogEvent(_ERROR, "A new configuration has an error; the old one stays in force."),
    "restart_needed": LogEvent(_WARNING, "A changed setting only takes effect after a restart."),
    "config_warning": LogEvent(_WARNING, "A setting is allowed, but probably not meant."),
    "original_difference": LogEvent(_WARNING, "The configuration relies on something that llmux 2 did otherwise."),
    "internal_error": LogEvent(_ERROR, "An error in llmux itself, with its traceback. Please report it."),
    "loop_stalled": LogEvent(_WARNING, "The event loop did not run for a while; every request waited."),
    # switches and models
    "switch_started": LogEvent(_INFO, "A switch has begun: those in `from` drain, then sleep, then `to` wakes."),
    "switch_drained": LogEvent(_INFO, "Those that leave have finished their requests; their sleep hooks start."),
    "switch_ended": LogEvent(_INFO, "A switch is over: its result, and what it cost after the drain."),
    "switch_failed": LogEvent(_ERROR, "A switch did not reach its target."),
    "model_activated": LogEvent(_INFO, "The model is awake; without `duration_secs` it was found running."),
    "model_deactivated": LogEvent(_INFO, "The model no longer is awake; `active_secs` says how long it was."),
    "model_deepened": LogEvent(
        _INFO, "A model that sleeps was put into a deeper level, as the host memory was short."
    ),
    "model_lost": LogEvent(_WARNING, "The model's engine is gone; its sleep hook cleans up."),
    "model_faulted": LogEvent(
        _ERROR,
        "It is unknown whether the model still holds the GPU. Repair it by hand, and run the command in `repair`.",
    ),
    "model_assumed_asleep": LogEvent(
        _WARNING, "Every cleanup failed, but so did `alive`: the model counts as asleep. `unproven` says what."
    ),
    "model_reset": LogEvent(_INFO, "An operator has cleared the model's backoff and fault."),
    "model_removed": LogEvent(_INFO, "A model that left the configuration is gone."),
    "sleep_hook_failed": LogEvent(_ERROR, "A sleep hook failed, or `verify` never passed after it."),
    "backoff_started": LogEvent(_WARNING, "After failures in a row the model is left alone for a while."),
    "pin_set": LogEvent(_INFO, "A model is pinned, or no longer."),
    "lease_set": LogEvent(_INFO, "The GPU is lent to a foreign job, or came back."),
    "lease_held": LogEvent(_INFO, "Nothing holds the GPU any more: the job that leased it may begin."),
    "manual_set": LogEvent(_INFO, "Manual mode began: only operators switch. Or it ended."),
    "command_answered": LogEvent(_DEBUG, "An operator's command was accepted, or why not."),
    # policy
    "policy_decided": LogEvent(
        _DEBUG, "What the policy answered, when it differs from its last answer or a switch came between."
    ),
    "policy_overruled": LogEvent(
        _WARNING, "The policy's answer cannot be followed; first come, first served was used instead."
    ),
    "policy_adopted": LogEvent(
        _INFO, "`use: auto` has another of its policies decide; `reason` says what the last hour showed."
    ),
    "policy_look_failed": LogEvent(
        _WARNING, "`use: auto` could not look back on the last hour; the policy that decides stays."
    ),
    "shadow_dropped": LogEvent(_WARNING, "A shadow policy failed or was too slow; it is asked no more."),
    # requests
    "request_queued": LogEvent(_DEBUG, "A request waits for its model."),
    "request_finished": LogEvent(_INFO, "A request was answered: status, wait and duration (`access_log`)."),
    "request_rejected": LogEvent(
        _WARNING, "Requests are refused; one line for each model and reason in 10 s, `more` counts the others."
    ),
    "request_timeout": LogEvent(_WARNING, "A request waited longer than `request_timeout`."),
    "requests_cut": LogEvent(_WARNING, "Requests in flight were ended: the drain's deadline, or llmux stops."),
    "request_cancelled": LogEvent(_INFO, "An operator has ended a request that waited or was in flight."),
    "client_left": LogEvent(_DEBUG, "A client left before its answer was complete."),
    "malformed_request": LogEvent(_WARNING, "A request was not HTTP, or too large for llmux; answered with 4xx."),
    "too_many_connections": LogEvent(_WARNING, "More clients than `max_connections`; told once in 10 s."),
    "path_refused": LogEvent(_DEBUG, "A path that is not forwarded."),
    "origin_refused": LogEvent(_WARNING, "A web page that is not in `cors` tried to use llmux."),
    "host_refused": LogEvent(
        _WARNING, "A request called llmux by a name that is not in `hosts`, as DNS rebinding does."
    ),
    "engine_broke_off": LogEvent(_WARNING, "The engine's connection ended before the answer was complete."),
    # hooks
    "hook_started": LogEvent(_DEBUG, "A hook was started."),
    "hook_completed": LogEvent(_INFO, "A hook succeeded (debug for `alive` and `verify`)."),
    "hook_failed": LogEvent(
        _ERROR, "A hook failed (debug for `alive` and `verify`, which fail whenever the answer is no)."
    ),
    "hook_killed": LogEvent(_WARNING, "A hook is ended: its timeout has passed, or llmux stops."),
    "holder_unknown": LogEvent(
        _WARNING,
        "A model that is configured no more may hold the GPU, and its hooks are unknown: see to it by hand.",
    ),
    "prefetch_ended": LogEvent(_INFO, "A prefetch that still ran when its switch was over is ended."),
    "leftover_hook_ended": LogEvent(_WARNING, "A hook of a llmux that was killed still ran, and was ended."),
    "hook_output": LogEvent(_INFO, "A line that a hook printed (debug for `alive` and `verify`)."),
    "hook_output_truncated": LogEvent(_WARNING, "A hook printed more than is kept."),
    "hook_left_pipe_open": LogEvent(
        _WARNING, "A hook's child keeps its output open: that engine does not survive llmux's own end."
    ),
    # state file and log
    "state_file_set_aside": LogEvent(_WARNING, "The state file is damaged or not llmux's: renamed, start afresh."),
    "state_file_unreadable": LogEvent(_WARNING, "The state file cannot be read; llmux starts without it."),
    "state_file_unwritable": LogEvent(
        _WARNING, "Cannot write the state file: a crash now forgets which model holds the GPU. Logged once."
    ),
    "record_lines_lost": LogEvent(
        _WARNING, "The record's disk is too slow; lines are missing, and the file says how many."
    ),
    "record_unwritable": LogEvent(_WARNING, "The record cannot be written. Told once, until it can be again."),
    "ledger_unwritable": LogEvent(
        _ERROR, "The ledger cannot be written; its rows wait, and requests are served. Told once, until it can be."
    ),
    "ledger_rows_lost": LogEvent(
        _ERROR, "More rows wait for the ledger than are kept: `count` at first, then more."
    ),
    "ledger_set_aside": LogEvent(_ERROR, "The ledger's file is damaged: renamed, and a new one begun."),
    "reservations_settled": LogEvent(
        _WARNING,
        "llmux was killed with requests under way: what budgets reserved for them counts as spent.",
    ),
    "budget_unknown": LogEvent(
        _ERROR, "What a key has spent cannot be read from the ledger; it is counted from here on."
    ),
    "log_lines_dropped": LogEvent(_WARNING, "The reader of the log is too slow; `count` lines are missing."),
}

EVENTS: dict[str, str] = {name: event.meaning for name, event in CATALOGUE.items()}
