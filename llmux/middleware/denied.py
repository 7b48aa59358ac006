"""The control paths of the known engines: never forwarded, whatever the configuration allows.

A pattern is matched against the end of the path, case folded, at any depth: ``load_lora_adapter`` stops
``/load_lora_adapter`` and ``/v1/load_lora_adapter`` alike. ``*`` stays within one segment; a final ``/**``
means everything below, too. Where ``reads`` says so, the allowlist decides on GET and HEAD.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Denied:
    """One path that clients never reach, and why."""

    pattern: str
    engine: str
    effect: str
    reads: bool = False


def _all(engine: str, effect: str, patterns: str, *, reads: bool = False) -> tuple[Denied, ...]:
    return tuple(Denied(pattern, engine, effect, reads) for pattern in patterns.split())


DENIED: tuple[Denied, ...] = (
    # vLLM: sleep mode, weight transfer and the other routes of its development mode
    *_all("vLLM", "sleeps or wakes the engine", "sleep wake wake_up wakeup"),
    *_all("vLLM", "runs code in the engine", "collective_rpc rpc rpc/**"),
    *_all("vLLM", "drops caches that others use", "reset_*cache"),
    *_all("vLLM", "stops the engine's scheduler", "pause resume pause_generation resume_generation"),
    *_all("vLLM", "ends the requests of others", "abort_requests abort_request drop_peer"),
    *_all("vLLM", "starts or stops the profiler", "start_profile stop_profile start_profiler stop_profiler"),
    *_all("vLLM", "changes the engine's size", "scale_elastic_ep"),
    *_all("vLLM", "repairs the engine", "fault_tolerance/**"),
    *_all("vLLM", "changes the loaded LoRA adapters", "load_lora_adapter* unload_lora_adapter*"),
    *_all(
        "vLLM, SGLang",
        "replaces the weights",
        "update_weight* init_weight* start_weight_update start_draft_weight_update finish_weight_update"
        " destroy_weight* send_weights* weight_checker weights_checker post_process_weights",
    ),
    *_all("vLLM, SGLang", "reads the engine's internals", "server_info get_server_info get_weights_by_name"),
    # SGLang
    *_all("SGLang", "frees or takes back the GPU memory", "release_memory* resume_memory*"),
    *_all("SGLang", "drops caches that others use", "flush_cache clear_hicache* hicache/**"),
    *_all("SGLang", "stops or slows the engine's scheduler", "continue_generation slow_down freeze_gc"),
    *_all("SGLang", "records for the profiler", "*_expert_distribution_record dumper/**"),
    *_all("SGLang", "changes the engine's settings", "set_internal_state set_trace_level configure_logging"),
    *_all("SGLang router", "changes the router's workers", "add_worker remove_worker workers/**"),
    # llama.cpp's server, alone and as a router
    *_all("llama.cpp", "loads, unloads or downloads models", "models/load/** models/unload/** models/sse"),
    *_all("llama.cpp", "adds or deletes models", "models", reads=True),
    *_all("llama.cpp", "saves, restores or erases slots", "slots slots/**", reads=True),
    *_all("llama.cpp", "changes the engine's settings", "props", reads=True),
    *_all("llama.cpp", "changes the loaded LoRA adapters", "lora-adapters", reads=True),
    *_all("llama.cpp", "fetches addresses or runs tools on the server", "cors-proxy tools"),
    *_all("llama.cpp", "steers the generations of others", "completions/control"),
    # TabbyAPI, Aphrodite, text-generation-webui
    *_all("TabbyAPI", "loads or unloads models and adapters", "load unload reload"),
    *_all("TabbyAPI", "loads or unloads models and adapters", "v1/model/** v1/lora/**", reads=True),
    *_all("TabbyAPI", "switches templates or sampler presets", "template/** sampling/**", reads=True),
    *_all("TabbyAPI", "downloads models", "v1/download"),
    *_all("text-generation-webui", "loads models", "internal/model/** internal/lora/**", reads=True),
    *_all("text-generation-webui", "ends the generations of others", "stop-generation"),
    # Ollama, LM Studio, LocalAI, KoboldCpp
    *_all(
        "Ollama",
        "changes the stored models",
        "api/pull api/push api/create api/copy api/delete api/blobs/** api/me api/signout",
    ),
    *_all("LM Studio", "downloads models", "models/download models/download/**"),
    *_all("LocalAI", "installs or removes models", "models/apply models/delete/** backends/** backend/**"),
    *_all("KoboldCpp", "reloads the engine, ends generations", "admin admin/** extra/abort abort"),
    *_all("LMDeploy", "connects engines, frees their caches", "distserve/**"),
    # TensorRT-LLM and Triton
    *_all("TensorRT-LLM", "changes the engine's settings", "steady_clock_offset"),
    *_all("Triton", "loads or unloads models", "v2/repository/**"),
    *_all(
        "Triton",
        "maps memory or changes settings",
        "systemsharedmemory/** cudasharedmemory/** trace/setting v2/logging",
    ),
    # Stable diffusion servers behind /sdapi/v1
    *_all(
        "Stable Diffusion web UI",
        "loads, unloads or ends the engine",
        "unload-checkpoint reload-checkpoint server-kill server-restart server-stop refresh-*"
        " sdapi/v1/interrupt sdapi/v1/skip",
    ),
    *_all("Stable Diffusion web UI", "changes the engine's settings", "sdapi/v1/options", reads=True),
    # Whatever the engine
    *_all("any engine", "ends the engine", "shutdown restart kill quit terminate"),
    *_all("any engine", "is the profiler", "profile profiler profiler/** debug/**"),
)


def _expression(pattern: str) -> str:
    below = pattern.endswith("/**")
    body = "[^/]*".join(re.escape(part) for part in pattern.removesuffix("/**").split("*"))
    return body + ("(?:/.*)?" if below else "")


def _any_of(entries: tuple[Denied, ...]) -> re.Pattern[str]:
    return re.compile("/(?:" + "|".join(_expression(entry.pattern) for entry in entries) + ")", re.DOTALL)


_EVER = _any_of(tuple(entry for entry in DENIED if not entry.reads))
_WRITES = _any_of(DENIED)
_SINGLE = tuple((_any_of((entry,)), entry) for entry in DENIED)


def _hits(expression: re.Pattern[str], folded: str) -> bool:
    """Whether the expression matches from any slash to the end."""
    at = folded.find("/")
    while at >= 0:
        if expression.fullmatch(folded, at):
            return True
        at = folded.find("/", at + 1)
    return False


def denied(path: str, *, reading: bool = False) -> Denied | None:
    """Return the entry that forbids this normalized path, if one does. ``reading`` is GET or HEAD."""
    folded = path.casefold().rstrip("/")
    if not _hits(_EVER if reading else _WRITES, folded):
        return None
    return next(entry for single, entry in _SINGLE if not (reading and entry.reads) and _hits(single, folded))
