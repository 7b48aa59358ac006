from __future__ import annotations

import re
import timeit
import tracemalloc
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.middleware.paths import (
    DEFAULT_FORWARD,
    DENIED,
    ForwardedPaths,
    Kind,
    denied,
    glob_expression,
    with_slash,
)
from llmux.normal_path import can_be_in_path, path_of

NAMES = ("llama", "facebook/opt-125m", "facebook", "é/ü")
PATHS = ForwardedPaths(DEFAULT_FORWARD, NAMES)
EVERYTHING = ForwardedPaths(["/**"], NAMES)

NEVER = [
    "/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache",
    "/pause", "/resume", "/start_profile", "/stop_profile", "/scale_elastic_ep", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter",
    "/load_lora_adapter_from_tensors",
    "/lora-adapters", "/release_memory_occupation", "/resume_memory_occupation", "/flush_cache",
    "/update_weights_from_disk", "/update_weights_from_distributed", "/update_weights_from_tensor",
    "/init_weights_update_group", "/update_weights", "/init_weight_transfer_engine", "/models/load",
    "/models/unload", "/api/models/unload/llama", "/distserve/free_cache", "/hicache/storage-backend",
    "/v1/model/load", "/v1/model/unload", "/v1/lora/load", "/v1/lora/unload",
    "/v1/template/switch", "/v1/sampling/override/switch", "/v1/download", "/slots/0", "/slots/0/erase",
    "/props", "/shutdown", "/api/pull", "/api/delete", "/api/create", "/api/push", "/api/copy",
    "/api/blobs/sha256:00", "/release_memory", "/resume_memory", "/v2/repository/models/m/load",
    "/v2/repository/index", "/v1/internal/model/load", "/sdapi/v1/unload-checkpoint", "/sdapi/v1/options",
    "/v1/sleep", "/v1/wake_up", "/v1/flush_cache", "/v1/start_profile", "/v1/collective_rpc",
    "/fault_tolerance/apply", "/weight_checker", "/abort_requests", "/v1/chat/completions/control",
]  # fmt: skip
ALLOWED = [
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/responses/r_1/cancel",
    "/v1/messages", "/v1/messages/count_tokens", "/v1/audio/transcriptions", "/v1/audio/speech",
    "/v1/images/generations", "/v1/images/edits", "/v1/rerank", "/v1/score", "/v1/realtime",
    "/v1/files/file-1/content", "/v1/batches", "/completion", "/completions", "/chat/completions",
    "/infill", "/embedding", "/embeddings", "/rerank", "/reranking", "/v2/rerank", "/score", "/pooling",
    "/classify", "/tokenize", "/detokenize", "/apply-template", "/sdapi/v1/txt2img", "/sdapi/v1/img2img",
    "/v1/token/encode", "/v1/chat/completions/render",
]  # fmt: skip


NO_PATH = ["a;b", "a\\b", "..", "a/./b", "%2e%2E", "a%3Bb", "a%255cb", "a%00b", "a%ffb", "a/" * 70 + "b"]
SOME_PATH = [
    "a",
    "org/a:8b",
    "...",
    ".a",
    "a/",
    "a//b",
    "100%",
    "%zz",
    "a%41",
    "größe",
    "a b",
    "a?b#c",
    "sleep",
    "x" * 256,
]


@given(st.sampled_from([*NO_PATH, *SOME_PATH]) | st.text("a./\\;%2e3bB\xe9", min_size=1, max_size=9))
def test_which_names_can_stand_in_a_path_is_decided_as_paths_are(name):
    decided = PATHS.decide(f"/llmux/models/{quote(name, safe='')}/wake").kind is Kind.OWN
    assert can_be_in_path(name) is decided
    assert decided is (path_of("/llmux/fleet", name, "drain") is not None)
    assert name not in (NO_PATH if decided else SOME_PATH)


@pytest.mark.parametrize("path", NEVER)
@pytest.mark.parametrize("paths", [PATHS, EVERYTHING], ids=["default", "everything"])
def test_control_paths_are_never_forwarded(paths, path):
    assert paths.decide(path).kind is Kind.REFUSED
    assert paths.decide("/upstream/llama" + path).kind is Kind.REFUSED
    assert denied(path) is not None


@pytest.mark.parametrize("path", ALLOWED)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_what_clients_use_is_forwarded_by_default(path, method):
    route = PATHS.decide(path + "?a=b%20c&d", method)
    assert (route.kind, route.path, route.target) == (Kind.FORWARD, path, path + "?a=b%20c&d")


@pytest.mark.parametrize("path", ["/props", "/slots", "/lora-adapters", "/sdapi/v1/options"])
def test_reading_is_left_to_the_allowlist(path):
    assert EVERYTHING.decide(path, "GET").kind is Kind.FORWARD
    assert EVERYTHING.decide(path, "POST").kind is Kind.REFUSED
    assert EVERYTHING.decide(path, "HEAD").kind is Kind.FORWARD


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models?x=1", "/v1/models"),
        ("/v1/models/facebook/opt-125m", "/v1/models/facebook/opt-125m"),
        ("/v1/models/facebook%2Fopt-125m", "/v1/models/facebook/opt-125m"),
        ("/v1/models/router/v1/sleep", "/v1/models/router/v1/sleep"),
        ("//v1//models", "/v1/models"),
        ("/health/", "/health"),
        ("/ready", "/ready"),
        ("/metrics", "/metrics"),
        ("/llmux/status", "/llmux/status"),
        ("/llmux", "/llmux"),
        ("/llmux/models/a/b/sleep", "/llmux/models/a/b/sleep"),
        ("http://localhost:3000/health#top", "/health"),
        ("http://localhost", "/"),
        ("/", "/"),
    ],
)
def test_own_endpoints(target, path):
    route = EVERYTHING.decide(target, "GET")
    assert (route.kind, route.path) == (Kind.OWN, path)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../sleep", "/v1/./chat/completions", "/v1/%2e%2e/sleep", "/v1/%252e%252e/sleep", "/v1\\sleep",
        "/v1/%5csleep", "/v1/%255Csleep", "/v1/chat/completions;x", "/v1/chat/completions%3bx",
        "/v1/chat;a/completions", "/v1/..;/sleep", "/v1/chat/completions/.", "/v1/chat/..", "/..",
        "/SLEEP", "/v1/Sleep", "/v1/%73leep", "/v1/%2573leep", "/v1//sleep/", "//sleep", "/v1/sleep%2f",
        "/v1/\u017fleep", "/v1/%C5%BFleep", "http://h/sleep", "http://h:1//v1/sleep?x", "/sleep#/v1/x",
        "/sleep?/v1/chat/completions", "/upstream/llama/v1%2fsleep", "/upstream/llama//sleep",
        "/upstream/llama/%2e%2e/sleep", "/%75pstream/llama/v1", "/V1/chat/completions", "/nothing", "/a/v1/b",
        "/v1/" + "a/" * 100,
    ],
)  # fmt: skip
def test_refused(target):
    assert PATHS.decide(target).kind is Kind.REFUSED


@pytest.mark.parametrize(
    "target", ["/v1/v1/messages", "/v1//v1/chat/completions?beta=true", "http://h/v1/%761/responses"]
)
def test_a_base_address_that_ends_with_the_version_is_named_and_wakes_nothing(target):
    route = PATHS.decide(target)
    assert (route.kind, "/v1 twice" in route.reason) == (Kind.REFUSED, True)
    assert EVERYTHING.decide(target) == route
    assert PATHS.decide("/v1/v1").kind is Kind.FORWARD


@pytest.mark.parametrize(
    ("glob", "target"),
    [
        ("/v1/v1/**", "/v1/v1/messages"),
        ("/v1/v1/messages", "/v1//v1/messages?beta=true"),
        ("/v1/messages/messages", "/v1/messages/messages"),
    ],
)
def test_what_the_configuration_itself_lists_is_forwarded_however_odd(glob, target):
    for globs in ((*DEFAULT_FORWARD, glob), (glob,)):
        assert ForwardedPaths(globs).decide(target).kind is Kind.FORWARD
        assert ForwardedPaths(globs, without=[glob]).decide(target).kind is Kind.REFUSED
        assert ForwardedPaths(globs).decide("/v1/v1/sleep").kind is Kind.REFUSED


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/chat/completions/chat/completions"),
        ("POST", "/chat/completions/v1/chat/completions/"),
        ("POST", "/v1/messages/v1/messages?beta=true"),
        ("POST", "/v1/responses//responses"),
        ("POST", "/v1/embeddings/embeddings"),
        ("GET", "/v1/chat/completions/models"),
        ("GET", "/v1/messages/v1/models?limit=1000"),
    ],
)
def test_a_base_address_that_is_an_endpoint_is_named_and_wakes_nothing(method, target):
    route = PATHS.decide(target, method)
    assert (route.kind, "base address must end" in route.reason) == (Kind.REFUSED, True)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/responses/resp_1", "/v1/responses/models1", "/v1/messages/batches", "/v1/embeddings/models",
        "/v1/chat/completions/chatcmpl-1/messages", "/v1/chat/completions/render", "/v1/completions/x/completions",
    ],
)  # fmt: skip
def test_what_is_below_an_endpoint_is_forwarded(target):
    assert PATHS.decide(target, "GET").kind is Kind.FORWARD


@pytest.mark.parametrize(
    ("path", "whose"),
    [
        *((f"/api/{each}", "Ollama's own") for each in ("tags", "chat", "generate", "version", "show")),
        ("/openai/deployments/a/chat/completions?api-version=2024-10-21", "Azure's"),
        ("/v1beta/models/a:streamGenerateContent?alt=sse", "Gemini's own"),
    ],
)
def test_a_client_that_is_set_to_another_api_is_told_so(path, whose):
    assert f"it is of {whose} API: set the client to OpenAI's" in PATHS.decide(path, "GET").reason
    assert EVERYTHING.decide(path, "GET").kind is Kind.FORWARD  # its engine may speak it


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("/responses", "/v1/responses"),
        ("/messages?beta=true", "/v1/messages"),
        ("/audio/transcriptions", "/v1/audio/transcriptions"),
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/models", "/v1/models"),
    ],
)
def test_a_base_address_with_another_path_is_told_the_right_one(target, meant):
    assert f"; {meant} is:" in PATHS.decide(target, "GET").reason


@pytest.mark.parametrize("target", ["/favicon.ico", "/api/hello", "/nothing/v1", "/a/v2/v1/v1/b", "/responsesx"])
def test_no_path_is_suggested_that_would_not_do(target):
    assert PATHS.decide(target, "GET").reason.endswith("is not among the forwarded paths (see `forward`)")


@pytest.mark.parametrize(
    "target",
    [
        "", "*", "v1/chat/completions", "localhost:3000", "/v1/%", "/v1/%zz", "/v1/a%2", "/v1/%00", "/v1/%0a",
        "/v1/%250d%250a", "/v1/a\r\nHost: x", "/v1/chat completions", "/v1/x?a=b\r\nX: y", "/v1/%7f",
        "/v1/%c2%85",
        "/v1/%ff", "/v1/%c0%af", "/v1/\udcff", "http:/v1/x", "http://a\\b/v1/x", "http://a%2fb/v1/x",
        b"/v1/\xff", "/v1/%" + "25" * 40 + "41",
    ],
)  # fmt: skip
def test_malformed(target):
    assert PATHS.decide(target).kind is Kind.MALFORMED


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("http://h:3000/v1/chat/completions?a=%zz", "/v1/chat/completions?a=%zz"),
        ("HTTPS://[::1]/v1/x#frag?no", "/v1/x"),
        ("/v1/x?a#b", "/v1/x?a"),
        ("/v1/x?", "/v1/x?"),
        ("//v1///chat//completions", "//v1///chat//completions"),
        ("/%76%31/chat/completions", "/%76%31/chat/completions"),
        ("/v1/files/100%25", "/v1/files/100%25"),
        ("/v1/é", "/v1/é"),
        ("/completion/", "/completion/"),
        (b"/v1/caf\xc3\xa9?\xff", "/v1/café?\udcff"),
    ],
)
def test_what_is_sent_on(target, sent):
    for _ in range(2):  # the second is answered from the cache
        route = PATHS.decide(target)
        assert (route.kind, route.target) == (Kind.FORWARD, sent)


@pytest.mark.parametrize(
    ("target", "model", "sent"),
    [
        ("/upstream/llama/v1/chat/completions?x=1", "llama", "/v1/chat/completions?x=1"),
        ("/upstream/llama", "llama", "/"),
        ("/upstream/llama/", "llama", "/"),
        ("/upstream/facebook/opt-125m/health", "facebook/opt-125m", "/health"),
        ("/upstream/facebook%2Fopt-125m/a%2fb", "facebook/opt-125m", "/a%2fb"),
        ("/upstream/facebook/other", "facebook", "/other"),
        ("/upstream/%C3%A9/%c3%bc/x", "é/ü", "/x"),
        ("/upstream//llama/x", "llama", "/x"),
        ("/upstream/nobody/x", "nobody", "/x"),
        ("/upstream/llama/slots", "llama", "/slots"),
    ],
)
def test_upstream(target, model, sent):
    for _ in range(2):
        route = PATHS.decide(target, "GET")
        assert (route.kind, route.model, route.target) == (Kind.UPSTREAM, model, sent)


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("/upstream/llama", "./llama/"),
        ("/upstream/llama?a=b/", "./llama/?a=b/"),
        ("/upstream/facebook/opt-125m", "./opt-125m/"),
        ("/upstream/facebook%2Fopt-125m", "./facebook%2Fopt-125m/"),
        ("/upstream/llama/", None),
        ("/upstream/llama/?x", None),
        ("/upstream/llama/health", None),
        ("/upstream/", None),
        ("/", None),
        ("/v1/models", None),
    ],
)
def test_where_the_page_of_an_engine_is(target, place):
    assert with_slash(target, PATHS.decide(target, "GET")) == place


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("/v1/**", ["/v1", "/v1/a", "/v1/a/b"], ["/v12", "/a/v1/b"]),
        ("/api/*", ["/api/a", "/api/"], ["/api", "/api/a/b"]),
        ("/a/**/z", ["/a/z", "/a/b/c/z"], ["/az", "/a/b"]),
        ("/a*c.d", ["/ac.d", "/abbc.d"], ["/ab/c.d", "/abcxd"]),
        ("/**", ["", "/a/b"], []),
    ],
)
def test_globs(glob, yes, no):
    expression = re.compile(glob_expression(glob))
    assert all(expression.fullmatch(path) for path in yes)
    assert not any(expression.fullmatch(path) for path in no)


@pytest.mark.parametrize("glob", ["v1/**", "", "/v1/a**", "/v1/***"])
def test_globs_that_cannot_be(glob):
    with pytest.raises(ValueError, match=r"slash|segments"):
        glob_expression(glob)


def test_no_globs_forward_nothing():
    assert ForwardedPaths([]).decide("/v1/chat/completions").kind is Kind.REFUSED


SLASHES = ["//", "\\", "/./", "/x/../", "/%2e/", ";a=b/", "%2f", "%255c", "/;/"]


@st.composite
def disguised(draw):
    """A denied path, written in some way that an engine might understand all the same."""
    path = draw(st.sampled_from(NEVER))
    if draw(st.booleans()):
        path = "/v1" + path
    out = []
    for plain in path:
        char = plain
        trick = draw(st.integers(0, 9))
        if trick == 0:
            char = char.swapcase()
        elif trick == 1:
            char = "%" + format(ord(char), "02x")
        elif trick == 2:
            char = "%25" + format(ord(char), "02X")
        elif trick == 3 and char == "/":
            char = draw(st.sampled_from(SLASHES))
        out.append(char)
    prefix = draw(st.sampled_from(["", "http://h:1", "/v1/..", "/upstream/llama", "/"]))
    suffix = draw(st.sampled_from(["", "/", "//", "?x=y", "#f", ";a", "%2f", "/.", "%3B", "\\"]))
    return prefix + "".join(out) + suffix


@settings(max_examples=150)
@given(disguised(), st.sampled_from([PATHS, EVERYTHING]))
def test_no_trick_forwards_a_control_path(target, paths):
    route = paths.decide(target)
    if route.kind is Kind.OWN:  # /v1/models/load is a model that is called "load"
        assert route.path.startswith("/v1/models/")
    elif route.kind is Kind.UPSTREAM:  # /upstream/llama%2fsleep is a model that is called "llama/sleep"
        assert route.model not in NAMES
    else:
        assert route.kind in {Kind.REFUSED, Kind.MALFORMED}


@settings(max_examples=300)
@given(st.text(max_size=40), st.binary(max_size=20))
def test_an_allowed_target_is_sent_as_it_came(text, query):
    raw = ("/v1/x" + quote(text, safe="/%;\\.é")).encode() + b"?" + query
    route = PATHS.decide(raw)
    again = PATHS.decide(raw)
    assert route == again
    if route.kind is Kind.FORWARD:
        assert route.target.encode("utf-8", "surrogateescape") == raw.partition(b"#")[0]


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_anything_gets_an_answer(text):
    assert isinstance(PATHS.decide(text).kind, Kind)
    assert isinstance(EVERYTHING.decide("/" + text, "GET").kind, Kind)


def test_every_denied_pattern_says_what_it_does():
    assert len({entry.pattern for entry in DENIED}) == len(DENIED)
    assert all(entry.engine and entry.effect and entry.pattern == entry.pattern.casefold() for entry in DENIED)


def test_invented_targets_do_not_grow_memory():
    paths = ForwardedPaths()
    tracemalloc.start()
    try:
        for number in range(5000):
            paths.decide(f"/v1/{number:0200d}")
        paths.decide("/v1/" + "a" * 100_000)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 2_000_000


def test_the_common_case_is_quick():
    seconds = min(timeit.repeat(lambda: PATHS.decide("/v1/chat/completions"), number=1000, repeat=5)) / 1000
    assert seconds < 20e-6  # about 0.3 µs on an idle machine


def test_the_worst_target_is_quick_enough():
    worst = "/v1/" + "sleep/x/" * 30 + "%25" * 2500
    assert min(timeit.repeat(lambda: EVERYTHING.decide(worst), number=1, repeat=3)) < 0.05


def test_a_lone_surrogate_is_malformed():
    assert PATHS.decide("/v1/\ud800").kind is Kind.MALFORMED
