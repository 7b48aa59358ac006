"""Which paths are forwarded to an engine: an allowlist, under a deny list that nothing overrides.

The decision is made on the normal form of the path (``normal_path``), never on what is sent on: scheme and
authority of an absolute target removed, fragment cut, and the case folded for the deny list.

What is allowed goes on as the raw target, byte for byte, query included. Of an absolute target the engine gets
the origin form (path and query, as they stood); a fragment, which HTTP does not know, is not sent.

Targets are ``str`` whose undecodable bytes are surrogate escapes, as aiohttp gives them; ``bytes`` are taken as
well. ``Route.target.encode("utf-8", "surrogateescape")`` gives back the bytes of the client.

``DENIED`` are the control paths of the known engines. A pattern is matched against the end of the path, case
folded, at any depth: ``load_lora_adapter`` stops ``/load_lora_adapter`` and ``/v1/load_lora_adapter`` alike.
``*`` stays within one segment; a final ``/**`` means everything below, too. Where ``reads`` says so, the
allowlist decides on GET and HEAD.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from llmux.config.access import DEFAULT_FORWARD, glob_expression
from llmux.normal_path import AmbiguousError, MalformedError, decode_once, normalize


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


def _any_entry(entries: tuple[Denied, ...]) -> re.Pattern[str]:
    return re.compile("/(?:" + "|".join(_expression(entry.pattern) for entry in entries) + ")", re.DOTALL)


_EVER = _any_entry(tuple(entry for entry in DENIED if not entry.reads))
_WRITES = _any_entry(DENIED)
_SINGLE = tuple((_any_entry((entry,)), entry) for entry in DENIED)


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


_OWN = re.compile(r"/|/v1/models(/.*)?|/health|/ready|/metrics|/llmux(/.*)?", re.DOTALL)
_BARE_MODELS = "/models"  # as /v1/models, for clients whose base address ends without /v1
UPSTREAM = "/upstream/"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"  # is answered without waking a model: not on the fast path
DIALECTS = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    MESSAGES: "messages",
    "/v1/responses": "responses",
}
"""The dialects of conversations, by the paths on which they are spoken."""
_RAW_MESSAGES = re.compile(r"(?:https?://[^/?#]*)?/+v1/+messages(?![^/?#;\\])", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._~:\[\]@!$&'()*+,=-]*(?=[/?]|\Z)")
_RAW_CONTROL = re.compile(r"[\x00-\x20\x7f]")
# What clients ask for whose base address is an endpoint.
_ENDPOINT_TWICE = re.compile(
    r"(?:/v1)?/(chat/completions|completions|embeddings|messages|responses)/(?:v1/)?\1"
    r"|(?:/v1)?/(?:chat/completions|messages|responses)/(?:v1/)?models"
)
_FOREIGN = (
    (re.compile(r"/api/(?:chat|embed|embeddings|generate|ps|show|tags|version)"), "Ollama's own"),
    (re.compile(r"/openai/deployments/.*", re.DOTALL), "Azure's"),
    (re.compile(r"/v1beta/models(?:/.*)?", re.DOTALL), "Gemini's own"),
)
_BROAD = frozenset({*DEFAULT_FORWARD, "/**"})  # that one of these matches a path does not show that it is meant
_WITHOUT_VERSION = re.compile(r"/(?:audio|images|messages|moderations|realtime|responses)(?:/.*)?", re.DOTALL)
OPEN_PATHS = frozenset({"/health", "/ready"})
ADMIN_PREFIXES = ("/llmux/models/", "/llmux/requests/", "/llmux/lease", "/llmux/manual", "/llmux/fleet/")
PAGE = "/llmux/ui"  # it tells nothing by itself, and a browser that opens it has no key to show yet
_READS = frozenset({"GET", "HEAD"})
_MAX_CACHED = 1024
_MAX_CACHED_LENGTH = 256


class Kind(enum.Enum):
    """What becomes of a request, as far as its path tells."""

    FORWARD = "forward"
    OWN = "own"
    UPSTREAM = "upstream"
    REFUSED = "refused"  # 404
    MALFORMED = "malformed"  # 400


class Route(NamedTuple):
    """The decision on one target.

    ``path`` is the normalized path, "" when there is none. ``target`` is what the engine gets (for OWN: the
    origin form of the target). ``model`` belongs to UPSTREAM: a known name, or the first segment when none
    matches; ``path`` is then what follows it. ``reason`` is for people (REFUSED, MALFORMED).
    """

    kind: Kind
    path: str = ""
    target: str = ""
    model: str = ""
    reason: str = ""

    @property
    def for_clients(self) -> bool:
        """Whether it takes a client's key, whatever the request says besides."""
        path = self.path
        if self.kind is Kind.OWN:
            return path != "/" and path not in OPEN_PATHS and not path.startswith((*ADMIN_PREFIXES, PAGE))
        return self.kind is Kind.FORWARD

    def anthropic(self, raw_target: str) -> bool:
        """Whether the client expects Anthropic's envelope and events: it asked for ``/v1/messages`` or below.

        ``raw_target`` counts where no path was made out of it, because it is refused or malformed.
        """
        path = self.path
        if path:
            return path == MESSAGES or path.startswith(f"{MESSAGES}/")
        return _RAW_MESSAGES.match(raw_target) is not None


def with_slash(raw_target: str, route: Route) -> str | None:
    """Return where ``/upstream/MODEL`` without a last slash leads: there the engine's relative links work.

    None: it is another path, or has its slash.
    """
    path, question, query = raw_target.partition("?")
    if route.kind is not Kind.UPSTREAM or route.path != "/" or path.endswith("/"):
        return None
    return f"./{path.rpartition('/')[2]}/{question}{query}"


def origin_form(target: str) -> str:
    """Strip scheme, authority and fragment from a request target."""
    if _RAW_CONTROL.search(target):
        raise MalformedError("the target has a control character")
    target = target.partition("#")[0]
    if target.startswith("/"):
        return target
    found = _ABSOLUTE.match(target)
    if found is None:
        raise MalformedError("the target is not a path")
    rest = target[found.end() :]
    return rest if rest.startswith("/") else "/" + rest


def _twice(path: str) -> str:
    """Say what a path has twice, "" if nothing: a model would be woken for its engine's 404."""
    if path.startswith("/v1/v1/"):
        return "it has /v1 twice: the client's base address must end without it"
    if _ENDPOINT_TWICE.fullmatch(path):
        return f"{path} is below an endpoint: the client's base address must end before that"
    return ""


def _any_of(globs: Iterable[str]) -> re.Pattern[str]:
    expression = "|".join(glob_expression(glob) for glob in globs)
    return re.compile(f"(?:{expression})" if expression else r"(?!)")


class ForwardedPaths:
    """Decides on request targets. Made anew when the configuration changes."""

    def __init__(
        self, globs: Iterable[str] = DEFAULT_FORWARD, names: Iterable[str] = (), *, without: Iterable[str] = ()
    ) -> None:
        """``globs`` are those of ``forward``, ``names`` the models and aliases for ``/upstream/NAME/…``.

        What is ``without`` is refused, whatever ``globs`` say.
        """
        globs = tuple(globs)
        self._allowed = _any_of(globs)
        self._meant = _any_of(glob for glob in globs if glob not in _BROAD)
        self._without = _any_of(without)
        self._names = frozenset(names)
        self._name_segments = max((name.count("/") for name in self._names), default=0) + 1
        self._reads: dict[str, Route] = {}
        self._writes: dict[str, Route] = {}

    def decide(self, target: str | bytes, method: str = "POST") -> Route:
        """Say what becomes of a request for this raw target."""
        if isinstance(target, bytes):
            target = target.decode("utf-8", "surrogateescape")
        cache = self._reads if method in _READS else self._writes
        route = cache.get(target)
        if route is not None:
            return route
        path, question, query = target.partition("?")
        # A query that could end early, or that no parser should have let through, takes the long way.
        if not question or "#" in target or _RAW_CONTROL.search(query):
            return self._decide(target, cache)
        route = cache.get(path) or self._decide(path, cache)
        if not route.target:
            return route
        kind, normal, forwarded, model, reason = route
        return Route(kind, normal, f"{forwarded}?{query}", model, reason)

    def _decide(self, target: str, cache: dict[str, Route]) -> Route:
        try:
            origin = origin_form(target)
            raw_path, question, query = origin.partition("?")
            route = self._route(raw_path, reading=cache is self._reads)
        except MalformedError as error:
            return Route(Kind.MALFORMED, reason=str(error))
        except AmbiguousError as error:
            return Route(Kind.REFUSED, reason=str(error))
        if question:
            return route._replace(target=f"{route.target}?{query}") if route.target else route
        if len(target) <= _MAX_CACHED_LENGTH and "#" not in target:
            if len(cache) >= _MAX_CACHED:  # invented targets push out the others, and cost one decision each
                cache.clear()
            cache[target] = route
        return route

    def _route(self, raw_path: str, *, reading: bool) -> Route:
        path = normalize(raw_path)
        if path.startswith(UPSTREAM):
            return self._upstream(raw_path, path, reading=reading)
        # A name may end as a control path does: its entry, which goes to no engine, can be read all the same.
        mine = path == "/v1/models" or path.startswith(("/llmux/", "/v1/models/") if reading else "/llmux/")
        entry = None if mine else denied(path, reading=reading)
        if entry is not None:
            return Route(Kind.REFUSED, path, reason=f"a control path ({entry.engine}): it {entry.effect}")
        if _OWN.fullmatch(path):
            return Route(Kind.OWN, path, raw_path)
        twice = "" if self._meant.fullmatch(path) else _twice(path)
        if not twice and self._forwards(path):
            return Route(Kind.FORWARD, path, raw_path)
        if reading and path == _BARE_MODELS:
            return Route(Kind.OWN, path, raw_path)
        reason = f"{path} is not among the forwarded paths (see `forward`){self._advice(path)}"
        return Route(Kind.REFUSED, path, reason=twice or reason)

    def _forwards(self, path: str) -> bool:
        return bool(self._allowed.fullmatch(path)) and not self._without.fullmatch(path)

    def _advice(self, path: str) -> str:
        """Return what a client's settings should be that asks for this path, "" if that is unknown."""
        for paths, whose in _FOREIGN:
            if paths.fullmatch(path):
                return f"; it is of {whose} API: set the client to OpenAI's, with a base address that ends in /v1"
        at = path.find("/v1/")
        meant = f"/v1{path}" if _WITHOUT_VERSION.fullmatch(path) else path[at:] if at > 0 else ""
        if not meant or meant.startswith("/v1/v1/") or not (self._forwards(meant) or _OWN.fullmatch(meant)):
            return ""
        return f"; {meant} is: set the client's base address to llmux's own, with /v1 where the client expects it"

    def _upstream(self, raw_path: str, path: str, *, reading: bool) -> Route:
        """``/upstream/MODEL/rest``: the longest known name wins; the rest goes on raw."""
        merged = raw_path.lstrip("/")
        if not merged.startswith(UPSTREAM[1:]):
            return Route(Kind.REFUSED, path, reason="/upstream/ is written plainly")
        segments = merged[len(UPSTREAM) - 1 :].lstrip("/").split("/")
        model, used = decode_once(segments[0]), 1
        for count in range(min(self._name_segments, len(segments)), 0, -1):
            name = decode_once("/".join(segments[:count]))
            if name in self._names:
                model, used = name, count
                break
        rest = "/" + "/".join(segments[used:])
        below = normalize(rest)
        entry = denied(below, reading=reading)
        if entry is not None:
            return Route(Kind.REFUSED, path, reason=f"a control path ({entry.engine}): it {entry.effect}")
        return Route(Kind.UPSTREAM, below, rest, model)
