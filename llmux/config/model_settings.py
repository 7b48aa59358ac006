"""The settings of one model.

One line may replace its hooks. ``hooks: llama-cpp`` names a script that comes with llmux, ``hooks: ./my.sh`` one
of the user's own; it is called with the hook's name as its argument. ``cmd:`` is the command of a server, which
``process.sh`` starts and stops; its port is derived from the model's name, so that an engine which outlives llmux
is found again.
"""

import difflib
import shlex
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmux.config.remotes import SpillConfig
from llmux.config.residency import Gpus, Levels, ModelMemory
from llmux.config.setting_types import (
    Address,
    Count,
    Default,
    Duration,
    EnginePort,
    EnvName,
    EnvValue,
    Name,
    PositiveCount,
    PositiveDuration,
    Script,
    Section,
    Word,
    parse_address,
)
from llmux.config.targets import Apis, VariantConfig
from llmux.core.spec import DEFAULT_TIMEOUTS, HookKind

GIVEN = (HookKind.WAKE, HookKind.SLEEP, HookKind.ALIVE, HookKind.VERIFY, HookKind.STOP)
"""The hooks that a script named in ``hooks:`` has to know, as its first argument."""
LONGEST_DESCRIPTION = 1024  # characters
LONGEST_TITLE = 200  # characters
PROCESS = "process"  # the script that runs ``cmd``
FIRST_PORT, PORTS = 20_000, 10_000  # below what systems give to outgoing connections
_SINGLE = frozenset({"gpu-free", "prefetch"})  # these are one hook, not five


def hook_folder() -> Path:
    """Return the folder of the scripts that come with llmux: in the package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "hooks"
    return installed if installed.is_dir() else package.parent / "hooks"


def script_of(hooks: str) -> str:
    """Return the shell words for ``hooks``, to which the hook's name is added.

    Raises:
        ValueError: no script of that name comes with llmux.

    """
    if "/" in hooks or len(hooks.split()) != 1:
        return hooks.strip()
    known = sorted(file.stem for file in hook_folder().glob("*.sh") if file.stem not in _SINGLE)
    name = hooks.strip().removesuffix(".sh")
    if name in known:
        return shlex.quote(str(hook_folder() / f"{name}.sh"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? One" if near else "one"
    raise ValueError(
        f"no script {name!r} comes with llmux; {hint} of your own is written with its path, as ./{name}.sh"
    )


def expand(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's settings with those that ``hooks`` or ``cmd`` stands for. Given settings stay."""
    found = dict(model)
    hooks, cmd = found.get("hooks"), found.get("cmd")
    if isinstance(cmd, str) and cmd.strip() and hooks is None:
        hooks = PROCESS
        env = found.get("env")
        if env is None or isinstance(env, Mapping):
            found["env"] = {"COMMAND": cmd.strip(), **_port(found), **(env or {})}
    if hooks is None and cmd is None:
        return found
    try:
        script = script_of(hooks) if isinstance(hooks, str) and hooks.strip() else "false"
    except ValueError:
        script = "false"  # the setting's own check reports the error
    for kind in GIVEN:
        found.setdefault(kind.value, f"{script} {kind}")
    return found


def _port(model: Mapping[str, Any]) -> dict[str, str]:
    port, url = model.get("port"), model.get("url")
    if port is None and isinstance(url, str):
        try:
            port = parse_address(url).port
        except ValueError:
            return {}
    return {} if port is None else {"PORT": str(port)}


def with_ports(models: Mapping[str, Any], seed: object) -> dict[str, Any]:
    """Return the models with a port for each that has a ``cmd`` and no address.

    It is derived from ``seed`` and the model's name, and is the same at every start; if two would have the same
    one, the later model gets the next.
    """
    taken = {model.get("port") for model in models.values() if isinstance(model, Mapping)}
    taken |= {int(port) for port in taken if isinstance(port, str) and port.isdecimal()}
    found = dict(models)
    for name, model in models.items():
        if not isinstance(model, Mapping) or not isinstance(model.get("cmd"), str):
            continue
        if model.get("port") is not None or model.get("url") is not None:
            continue
        place = zlib.crc32(f"{seed}/{name}".encode())
        port = next(port for n in range(PORTS) if (port := FIRST_PORT + (place + n) % PORTS) not in taken)
        taken.add(port)
        found[name] = {**model, "port": port}
    return found


LOOPBACK = "127.0.0.1"


def _url(value: str) -> str:
    return parse_address(value).url


Url = Annotated[str, AfterValidator(_url), Word("URL")]


def _hooks(value: str) -> str:
    script_of(value)
    return value


class TimeoutsConfig(Section):
    """How long each hook may take before it is ended (TERM, 5 s, KILL) and counts as failed."""

    wake: PositiveDuration = Field(
        default=DEFAULT_TIMEOUTS[HookKind.WAKE], description="Longest run of the wake hook."
    )
    sleep: PositiveDuration = Field(
        default=DEFAULT_TIMEOUTS[HookKind.SLEEP], description="Longest run of the sleep hook."
    )
    alive: PositiveDuration = Field(
        default=DEFAULT_TIMEOUTS[HookKind.ALIVE], description="Longest run of the alive hook."
    )
    verify: PositiveDuration = Field(
        default=DEFAULT_TIMEOUTS[HookKind.VERIFY],
        description="How long verify is repeated, every 0.5 s, until it passes.",
    )
    stop: PositiveDuration = Field(
        default=DEFAULT_TIMEOUTS[HookKind.STOP], description="Longest run of the stop hook."
    )
    prefetch: PositiveDuration = Field(
        default=DEFAULT_TIMEOUTS[HookKind.PREFETCH], description="Longest run of the prefetch hook."
    )


class CostConfig(Section):
    """A first guess at what a switch costs, used until it has been measured."""

    wake: Duration | None = Field(default=None, description="Expected duration of the wake hook.")
    sleep: Duration | None = Field(
        default=None, description="Expected duration of the sleep hook, verify included."
    )


Capability = Literal[
    "tools",
    "vision",
    "reasoning",
    "audio",
    "transcription",
    "speech",
    "images",
    "image_edit",
    "embeddings",
    "rerank",
]


class InfoConfig(Section):
    """What clients are told about the model, in `/v1/models`."""

    name: Annotated[str, Field(max_length=LONGEST_TITLE)] | None = Field(
        default=None, description="What clients show in place of the name that requests have."
    )
    description: Annotated[str, Field(max_length=LONGEST_DESCRIPTION)] | None = Field(
        default=None, description="What the model is for, in a few words."
    )
    context: PositiveCount | None = Field(
        default=None, description="Tokens that prompt and answer may have together. null: not told."
    )
    capabilities: tuple[Capability, ...] = Field(
        default=(),
        description="What it can do: tools, vision, reasoning, audio, transcription, speech, images, image_edit,"
        " embeddings, rerank.",
    )
    unlisted: bool = Field(
        default=False,
        description="true: not listed, nor are its aliases; requests for them are served all the same.",
    )


class ModelConfig(Section):
    """One model: where its engine listens, and the shell hooks that control it."""

    port: EnginePort | None = Field(
        default=None, description="Port of the engine on 127.0.0.1. Either this or `url`."
    )
    url: Url | None = Field(
        default=None, description="Address of the engine, as http://127.0.0.1:8001. Either this or `port`."
    )
    hooks: Annotated[Script, AfterValidator(_hooks)] | None = Field(
        default=None,
        description="One script for wake, sleep, alive, verify and stop: the NAME of one that comes with llmux, as"
        " llama-cpp, or a path. A hook that is given itself stays.",
    )
    cmd: Script | None = Field(
        default=None,
        description="In place of hooks: a server's command, as `llama-server --port ${PORT} -m x.gguf`. It is"
        " started to wake and ended to sleep, by process.sh; without `port`, llmux chooses one.",
    )
    wake: Script = Field(description="Brings the engine up; returns 0 when it answers. Must be idempotent.")
    sleep: Script = Field(description="Puts the engine to sleep; returns 0 when the GPU is free.")
    alive: Script = Field(description="Returns 0 when the engine is awake and answers.")
    verify: Script | None = Field(
        default=None, description="After sleep: returns 0 only when the memory is really free."
    )
    stop: Script | None = Field(
        default=None, description="Harder than sleep; run when sleep or verify has failed."
    )
    prefetch: Script | None = Field(
        default=None,
        description="Beside the drain and the sleep of those that leave for it: prepares its wake"
        " without the GPU, as by reading its weights into the page cache.",
    )
    aliases: tuple[Name, ...] = Field(default=(), description="Other names under which clients reach the model.")
    upstream_model: Name | None = Field(
        default=None, description="What the engine calls the model, when it differs from the name here."
    )
    apis: Annotated[Apis | None, Default("all, passed through")] = Field(
        default=None,
        description="What the engine speaks: chat, completions, messages, responses, embeddings, count_tokens."
        " Requests in another dialect of conversations are translated.",
    )
    lossy: bool = Field(
        default=False,
        description="true: what cannot be translated is dropped, and listed in X-LLMux-Dropped, instead of 400.",
    )
    variants: Mapping[Name, VariantConfig] = Field(
        default_factory=dict, description="The model with other parameters, by the names that clients ask for."
    )
    spill: Annotated[SpillConfig | None, Word("spill or null")] = Field(
        default=None, description="When its requests go to a remote instead of waiting for it. null: never."
    )
    info: InfoConfig = Field(
        default_factory=InfoConfig.of_defaults, description="What clients are told about it, in `/v1/models`."
    )
    shared_address: bool = Field(
        default=False,
        description="Several models take turns on this address; they are never awake together.",
    )
    max_in_flight: PositiveCount | None = Field(
        default=None, description="Requests that the engine serves at once; more wait. null: no limit."
    )
    deadline: PositiveDuration | None = Field(
        default=None,
        description="Refuse with 503, at once, what cannot be answered within this, by the expected wait and the"
        " mean of its answers. `X-LLMux-Deadline` goes before it. null: nothing.",
    )
    max_queued: Count = Field(default=1000, description="Requests that may wait; more get 429.")
    memory: ModelMemory | None = Field(
        default=None,
        description="GPU memory taken while awake, spread evenly over its `gpus` or given for each;"
        " with `capacity` or `gpus`, several models may be awake.",
    )
    gpus: Gpus = Field(default=(), description="The GPUs that it runs on, out of the top-level `gpus`.")
    levels: Annotated[Levels, Default("[]")] = Field(
        default_factory=dict,
        description="How it may sleep, lightest first, with the host memory that each takes, as"
        " [ram: 18GiB, disk]; the hooks see `LLMUX_SLEEP_LEVEL`.",
    )
    idle_sleep: Annotated[PositiveDuration | None, Default("the top-level idle_sleep")] = Field(
        default=None,
        description="Put to sleep after this long without a request. null: never.",
    )
    preload: bool = Field(default=False, description="Wake the model at start.")
    keep_awake: bool = Field(
        default=False,
        description="Never sleeps for being idle, is the last to make room for others, and comes back as soon as"
        " it fits.",
    )
    env: Mapping[EnvName, EnvValue] = Field(
        default_factory=dict, description="Environment variables for the hooks."
    )
    timeouts: TimeoutsConfig = Field(
        default_factory=TimeoutsConfig.of_defaults, description="How long each hook may take."
    )
    cost: CostConfig = Field(
        default_factory=CostConfig.of_defaults,
        description="A first guess at the switch cost, until it is measured.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_line(cls, data: Any) -> Any:
        """Expand ``hooks`` or ``cmd``."""
        return expand(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.hooks is not None and self.cmd is not None:
            raise PydanticCustomError("one_line", "has both `hooks` and `cmd`; keep one of them")
        return self

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if self.port is None and self.url is None:
            raise PydanticCustomError("address", "needs `port`: the port on which its engine listens (or `url`)")
        if self.port is not None and self.url is not None:
            raise PydanticCustomError("address", "has both `port` and `url`; keep one of them")
        return self

    @property
    def address(self) -> Address:
        """The engine's address."""
        if self.url is not None:
            return parse_address(self.url)
        assert self.port is not None  # _one_address
        return Address(LOOPBACK, self.port)

    @property
    def scripts(self) -> Mapping[HookKind, str]:
        """The hooks that are given, by kind."""
        given = {
            HookKind.WAKE: self.wake,
            HookKind.SLEEP: self.sleep,
            HookKind.ALIVE: self.alive,
            HookKind.VERIFY: self.verify,
            HookKind.STOP: self.stop,
            HookKind.PREFETCH: self.prefetch,
        }
        return {kind: script for kind, script in given.items() if script is not None}
