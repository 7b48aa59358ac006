"""Remotes and what leads to them: what is refused, and on which line."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from llmux.cli.check import summary


def remote(text, rest=""):
    return f"""
        models:
          a: {{wake: ./w, sleep: ./s, alive: ./a, port: 8001}}
        remotes_for_all: true
        remotes:
          r: {{{text}}}
        {rest}
        """


WHOLE = "url: https://r.example/api, models: {m: theirs}, region: eu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {m: m}", "r.url: is missing"),
        ("url: https://x", "r.models: is missing"),
        ("url: ftp://x, models: {m: m}", "r.url: 'ftp://x' is not an http or https URL; write it as https://open"),
        ("url: https://u:p@x, models: {m: m}", "r.url: contains a user or password, which would end up in logs"),
        ("url: 'https://x/?a=b', models: {m: m}", "r.url: 'https://x/?a=b' has a query or fragment; remove it"),
        (
            "url: https://x, models: {}",
            "r.models: must name at least one of its models, as {qwen3: qwen/qwen3-32b}",
        ),
        ("url: https://x, models: {m: m}, key: ''", "r.key: must be printable ASCII without spaces"),
        ("url: https://x, models: {m: m}, key: [s3cret]", "r.key: must be text (in quotes where YAML"),
        ("url: https://x, models: {m: m}, key_file: gone", "r.key_file: there is no file "),
        ("url: https://x, models: {m: m}, ca: gone", "r.ca: there is no file "),
        (f"url: https://x, models: {{m: m}}, ca: {'x' * 256}", "r.ca: there is no file "),
        ("url: https://x, models: {m: m}, apis: [chats]", "r.apis[0]: must be chat, completions, messages"),
        ("url: https://x, models: {m: m}, region: '?'", "r.region: '?' is not a region; write a short word"),
        ("url: https://x, models: {m: m}, timeouts: {connect: 0}", "r.timeouts.connect: must be longer than 0"),
        ("url: https://x, models: {m: m}, key: a, key_file: KEY", "r: has both `key` and `key_file`; keep one"),
        ("url: http://x, models: {m: m}, ca: CA", "r.ca: is for https, but `url` is http"),
        ("url: https://x, models: {m: m}, timeout: 5s", "r.timeout: unknown setting; did you mean `timeouts`?"),
    ],
)
def test_a_remote_that_cannot_be_meant(refused, tmp_path, text, said):
    if "CA" in text:
        if shutil.which("openssl") is None:
            pytest.skip("makes a certificate with openssl")
        words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x -keyout k -out CA"
        subprocess.run(["openssl", *words.split()], check=True, capture_output=True, cwd=tmp_path)
    (tmp_path / "KEY").write_text("sk-1\n")
    [line] = refused(remote(text))
    assert line.startswith("config.yaml:6: remotes.")
    assert said in line
    assert "s3cret" not in line


def test_a_variable_that_is_not_set_is_told_with_its_line(refused):
    [line] = refused(remote(f'{WHOLE}, key: "${{NO_KEY}}"'))
    assert line.startswith("config.yaml:6: remotes.r.key: the variable NO_KEY is not set")


def test_a_key_comes_from_the_environment_or_a_file_and_is_not_shown(read, tmp_path):
    (tmp_path / "key").write_text("sk-file\n")
    config = read(remote(f'{WHOLE}, key: "${{K}}"'), environ={"K": "sk-env"})
    assert config.remotes["r"].secret == "sk-env"
    assert "sk-env" not in repr(config)
    assert read(remote(f"{WHOLE}, key_file: key")).remotes["r"].secret == "sk-file"


def test_a_file_that_holds_no_key(refused, tmp_path):
    (tmp_path / "key").write_text("two words\n")
    [line] = refused(remote(f"{WHOLE}, key_file: key"))
    assert "remotes.r.key_file: " in line
    assert "contains no key: one line of printable ASCII without spaces" in line
    assert "two words" not in line
    (tmp_path / "key").write_text("no certificate")
    [line] = refused(remote(f"{WHOLE}, ca: key"))
    assert "is not a file of certificates in PEM" in line


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("virtual: {v: {first: [a, r/x]}}", "virtual.v.first[1]: 'r/x' is not configured; did you mean 'r/m'?"),
        ("virtual: {r/m: {first: [a]}}", "virtual.r/m: 'r/m' is already a model of the remote r; choose another"),
        ("routes: [{to: r/x}]", "routes[0].to: 'r/x' is not configured; did you mean 'r/m'?"),
        ("routes: [{when: {key: k}}]", "routes[0].when.key: 'k' is not one of the named `api_keys`: none is set"),
        ("routes: [{when: {role: k}}]", "routes[0].when.role: 'k' is not one of `roles`: none is set"),
        ("routes: [{when: {imagse: true}}]", "routes[0].when.imagse: unknown setting; did you mean `images`?"),
        ("routes: [{when: {path: v1}}]", "routes[0].when.path: 'v1' is not a path; write one as /props"),
    ],
)
def test_what_leads_to_a_remote(refused, rest, said):
    [line] = refused(remote(WHOLE, rest))
    assert line.startswith(f"config.yaml:7: {said}")


@pytest.mark.parametrize(
    ("spill", "said"),
    [
        ("{to: r/x, over: 1s}", "spill.to: 'r/x' is not a model of a remote; did you mean 'r/m'?"),
        ("{to: a, over: 1s}", "spill.to: 'a' is not a model of a remote; there are r/m"),
        ("{to: v, over: 1s}", "spill.to: 'v' may end at 'a', which is here; name remotes' models only"),
        ("{to: r/m}", "spill.over: is missing"),
        ("{to: w, over: 1s}", "virtual.w: chooses from itself: w → w; take one out"),
    ],
)
def test_what_a_model_spills_to(refused, spill, said):
    virtual = "{v: {first: [r/m, a]}}" if "w," not in spill else "{w: {first: [r/m, w]}}"
    text = remote(WHOLE, f"virtual: {virtual}").replace("port: 8001", f"port: 8001, spill: {spill}")
    lines = refused(text)
    assert any(said in line for line in lines), lines


def test_a_remotes_model_has_no_longer_name_than_others(refused):
    [line] = refused(remote(WHOLE).replace("{m: theirs}", f"{{{'模' * 255}: m}}"))
    assert line.endswith("is longer than 256 characters with r/ in front; shorten it")


def test_a_model_is_not_called_as_a_remotes_is(refused):
    [line] = refused(remote(WHOLE).replace("          a: ", "          r/m: "))
    assert line == "config.yaml:6: remotes.r.models.m: 'r/m' is already the name of a model; choose another"


def test_what_check_says_of_them(read):
    spilling = remote(f"{WHOLE}, key: sk-1234").replace("port: 8001", "port: 8001, spill: {to: r/m, over: 1s}")
    shown = summary(read(spilling)).splitlines()[-3:]
    assert shown == [
        "model a at http://127.0.0.1:8001, spills to r/m",
        "remote r at https://r.example:443/api, with a key: r/m",
        "may leave this host: every request",
    ]
    keys = "api_keys: [{name: n, key: k, remote: true}, {name: o, key: l}]"
    assert summary(read(remote(WHOLE, keys))).endswith("may leave this host: requests with the keys n")
    assert summary(read(remote(WHOLE, keys.replace("true", "false")))).endswith("host: no request")


def test_what_is_probably_not_meant(read):
    [warning] = read(remote(WHOLE).replace("remotes_for_all: true", "")).warnings
    assert warning == "remotes: no request may leave this host; set `remotes_for_all: true` if that is meant"
    [warning] = read(remote(WHOLE, "routes: [{regions: [us]}]")).warnings
    assert warning == "routes[0].regions: 'us' is the `region` of no remote: eu"
    [warning] = read(
        remote(WHOLE).replace("port: 8001", "port: 8001, spill: {to: r/m, over: 9s, below: 1}")
    ).warnings
    assert warning.startswith("models.a.spill.below: what r/m costs is not known: it counts as dear; give")
    more = "port: 8001, spill: {to: r/m, over: 9s}, cost: {wake: 10s}"
    [warning] = read(remote(WHOLE).replace("port: 8001", more)).warnings
    assert warning.startswith("models.a.spill.over: is shorter than its `cost.wake`: while it sleeps all its")
    keys = "api_keys: [{name: n, key: k, remote: true}]"
    [warning] = read(remote(WHOLE, keys)).warnings
    assert warning.startswith("remotes_for_all: has no effect with `api_keys`")
    [warning] = read(remote(f"{WHOLE}, key: k".replace("https", "http"))).warnings
    assert "remotes.r.url: is http: its key and all requests go over the network in the clear" in warning
    assert not read(remote(f"{WHOLE}, key: k".replace("https://r.example", "http://127.0.0.1:1"))).warnings
