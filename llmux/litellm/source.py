"""The settings of LiteLLM's proxy, as far as they have an equivalent in llmux."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from llmux.config.problems import Path, Problem, explain
from llmux.llama_swap.source import Note, Part


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text)]
Seconds = Annotated[float, Field(ge=0)]
Fallbacks = tuple[Mapping[str, tuple[str, ...]], ...]


class Params(Part):
    """How a deployment is reached."""

    model: Text
    api_base: Text = ""
    base_url: Text = ""
    api_key: Text = ""
    custom_llm_provider: Text = ""
    max_parallel_requests: int | None = Field(default=None, ge=1)
    timeout: Seconds | Text | None = None
    stream_timeout: Seconds | Text | None = None
    order: int | None = None
    input_cost_per_token: float | None = Field(default=None, ge=0)
    output_cost_per_token: float | None = Field(default=None, ge=0)
    cache_read_input_token_cost: float | None = Field(default=None, ge=0)
    drop_params: bool = False


class Info(Part):
    """Information about a model."""

    description: Text = ""
    max_input_tokens: int | None = None
    max_tokens: int | None = None
    supports_vision: bool = False
    supports_function_calling: bool = False
    supports_reasoning: bool = False


class Deployment(Part):
    """One way to reach a model."""

    model_name: Text
    litellm_params: Params
    model_info: Info = Field(default_factory=Info)


class Alias(Part):
    """Another name for a model, in the long form."""

    model: Text
    hidden: bool = False


class RouterSettings(Part):
    """How a deployment is chosen for a request."""

    model_group_alias: Mapping[str, Text | Alias] = Field(default_factory=dict)
    fallbacks: Fallbacks = ()
    default_fallbacks: tuple[str, ...] = ()
    timeout: Seconds | None = None


class LiteLLMSettings(Part):
    """Settings of the library."""

    fallbacks: Fallbacks = ()
    default_fallbacks: tuple[str, ...] = ()
    drop_params: bool = False
    request_timeout: Seconds | None = None
    set_verbose: bool = False
    master_key: Text = ""


class GeneralSettings(Part):
    """Settings of the proxy."""

    master_key: Text = ""


class LiteLLM(Part):
    """The whole file."""

    model_list: tuple[Deployment, ...] = Field(min_length=1)
    router_settings: RouterSettings = Field(default_factory=RouterSettings)
    litellm_settings: LiteLLMSettings = Field(default_factory=LiteLLMSettings)
    general_settings: GeneralSettings = Field(default_factory=GeneralSettings)


def validate(data: dict[str, Any]) -> tuple[LiteLLM | None, list[Note], list[Problem]]:
    """Validate ``data``. LiteLLM takes a file with settings of a wrong type: they are removed, and named."""
    notes: list[Note] = []
    while True:
        try:
            return LiteLLM.model_validate(data), notes, []
        except ValidationError as error:
            problems = explain(error, LiteLLM)
        # Of a list with an invalid entry pydantic also says that it has too few.
        inner = {problem.path[:1] for problem in problems if len(problem.path) > 1}
        problems = [problem for problem in problems if problem.path not in inner]
        settings = {_setting(problem.path): problem for problem in reversed(problems)}
        if () in settings:
            return None, [], problems
        for path, problem in reversed(settings.items()):
            around: Any = data
            for part in path[:-1]:
                around = around[part]
            del around[path[-1]]
            notes.append(Note(path, problem.message))


def _setting(path: Path) -> Path:
    """Return which optional setting ``path`` is or is in; empty: none, LiteLLM does not do without."""
    if path[0] != "model_list":
        return path[:2]
    here = path[2:4]
    return () if not here or here[-1] in ("model_name", "litellm_params", "model") else path[:4]
