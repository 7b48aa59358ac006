"""The settings of LiteLLM that are not carried over, and what llmux has instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmux.config.problems import Path
from llmux.litellm.source import (
    Deployment,
    GeneralSettings,
    Info,
    LiteLLM,
    LiteLLMSettings,
    Params,
    RouterSettings,
)
from llmux.llama_swap.source import Note

SPREAD = "there, requests are spread over the deployments; here, the first that can be had takes them"
_LIMITS = "a deployment has no limit of its own here; keys have, see `limits` of `api_keys` and `roles`"
_DEFAULT = "a default for a parameter; write it as a variant's `default` (see `variants`)"
_RETRIES = "each target is tried once, and clients' SDKs try again; see `first`"
_COOLDOWN = "a breaker per remote does so by itself"
_DATABASE = "keys are in the configuration here (`api_keys`, `llmux key`), and what they used in `ledger`"
_CALLBACKS = "see `ledger`, `captures`, `otlp` and `/metrics`"
_CACHE = "llmux keeps no answers"

DEPLOYMENT = frozenset({*Deployment.model_fields})
INFO = frozenset({*Info.model_fields, "id", "db_model", "mode", "base_model", "max_output_tokens"})
PARAMS = frozenset({*Params.model_fields})
OF_PARAMS = {
    **dict.fromkeys(("rpm", "tpm"), _LIMITS),
    **dict.fromkeys(("weight",), SPREAD),
    **dict.fromkeys(("max_retries", "num_retries"), _RETRIES),
    **dict.fromkeys(("cooldown_time", "allowed_fails"), _COOLDOWN),
    **dict.fromkeys(
        ("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "frequency_penalty",
         "presence_penalty", "reasoning_effort", "thinking", "extra_body", "user", "response_format", "tools"),
        _DEFAULT,
    ),
    **dict.fromkeys(
        ("extra_headers", "headers", "organization", "api_version"), "a remote gets its key, and what clients send"
    ),
}  # fmt: skip
_ROUTER = frozenset({*RouterSettings.model_fields})
_OF_ROUTER = {
    "routing_strategy": SPREAD,
    **dict.fromkeys(("num_retries", "retry_after", "retry_policy", "max_fallbacks"), _RETRIES),
    **dict.fromkeys(("allowed_fails", "cooldown_time", "disable_cooldowns", "allowed_fails_policy"), _COOLDOWN),
    **dict.fromkeys(
        ("redis_host", "redis_port", "redis_password", "redis_url"),
        "one llmux counts by itself; for several see `fleet`",
    ),
    **dict.fromkeys(
        ("context_window_fallbacks", "enable_pre_call_checks"), "see `routes`: `{when: {tokens_over: …}, to: …}`"
    ),
    **dict.fromkeys(("cache_responses", "cache_kwargs"), _CACHE),
}
_WHOLE = frozenset({*LiteLLMSettings.model_fields, "json_logs", "telemetry"})
_OF_WHOLE = {
    **dict.fromkeys(("num_retries",), _RETRIES),
    **dict.fromkeys(("callbacks", "success_callback", "failure_callback", "service_callback"), _CALLBACKS),
    **dict.fromkeys(("cache", "cache_params"), _CACHE),
    **dict.fromkeys(("max_budget", "budget_duration"), "see `budget` of `roles` and `api_keys`"),
    "context_window_fallbacks": _OF_ROUTER["context_window_fallbacks"],
}
_OF_GENERAL = {
    **dict.fromkeys(
        ("database_url", "store_model_in_db", "database_connection_pool_limit", "disable_spend_logs", "alerting"),
        _DATABASE,
    ),
}
SECTIONS: Mapping[str, tuple[frozenset[str], Mapping[str, str]]] = {
    "router_settings": (_ROUTER, _OF_ROUTER),
    "litellm_settings": (_WHOLE, _OF_WHOLE),
    "general_settings": (frozenset(GeneralSettings.model_fields), _OF_GENERAL),
}
TOP = frozenset({*LiteLLM.model_fields})
OF_TOP = {
    "environment_variables": "set them in llmux's environment",
    "include": "import these files by themselves",
    "callback_settings": _CALLBACKS,
}
_NOTHING: tuple[Any, ...] = (None, False, "", {}, [])


def leftovers(
    at: Path, given: Mapping[str, Any], *, known: frozenset[str], reasons: Mapping[str, str] | None = None
) -> Iterator[Note]:
    """Yield the settings that are not carried over."""
    for key, value in given.items():
        if key not in known and value not in _NOTHING:
            yield Note((*at, key), (reasons or {}).get(key, "llmux has no such setting"))
