"""Where the accounts are kept, and what is refused there."""

import jsonschema
import pytest

from llmux.config.reference import json_schema

HEAD = "models: {q: {port: 8001, wake: w, sleep: s, alive: a}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ledger: 5", "config.yaml:2: ledger: must be a path, or true for a file beside the state file"),
        ("ledger: ''", "config.yaml:2: ledger: must be a path, or true for a file beside the state file"),
        ("ledger: [x]", "config.yaml:2: ledger: must be a path, or true for a file beside the state file"),
        (
            "ledger: true\nstate: null",
            "config.yaml:2: ledger: true means a file beside the state file, but `state` is null; give a path",
        ),
        (
            "prices: {gpu_hour: -1}",
            "config.yaml:2: prices.gpu_hour: must be an amount from 0 on, as 0.90, not '-1'",
        ),
        ("prices: {gpu_hour: x}", "config.yaml:2: prices.gpu_hour: must be an amount from 0 on, as 0.90, not 'x'"),
        ("prices: {gpu_hour: true}", "config.yaml:2: prices.gpu_hour: must be an amount, as 0.90"),
        (
            "prices: {currency: $}",
            "config.yaml:2: prices.currency: '$' is not a currency; write two to eight letters, as usd",
        ),
        (
            "prices:\n  models:\n    q: {in: 1}",
            "config.yaml:4: prices.models.q.in: unknown setting; known here: input, cached, output",
        ),
        (
            "ledger: true\nprices: {}\nroles: {free: {budget: {usd: 5, soft: 80%}}}",
            "config.yaml:4: roles.free.budget.soft: must be a number, not '80%'",
        ),
        (
            "ledger: true\nprices: {}\nroles: {free: {budget: {usd: 5, soft: 0}}}",
            "config.yaml:4: roles.free.budget.soft: must be more than 0.0, not 0",
        ),
        ("api_keys: [{name: a, key: k, weight: -3}]", "config.yaml:2: api_keys[0].weight: must be more than 0.0"),
        ("charge: {switch: me}", "config.yaml:2: charge.switch: must be causers, everyone or house, not 'me'"),
        (
            "api_keys: [{name: (house), key: k}]",
            "config.yaml:2: api_keys[0].name: '(house)' stands for what no key pays; choose another",
        ),
        (
            "captures: {keys: [bob]}\napi_keys: [{name: alice, key: k}]",
            "config.yaml:2: captures.keys[0]: 'bob' is not the name of one of `api_keys`: alice",
        ),
        (
            "captures: {keys: [bob]}",
            "config.yaml:2: captures.keys[0]: 'bob' is not the name of one of `api_keys`: none has a name",
        ),
        (
            "state: null\napi_keys: [{name: alice, key: k}]\ncaptures:\n  keys: [alice]",
            "config.yaml:4: captures: are kept beside the state file, but `state` is null; give a `folder`",
        ),
        ("captures: {keys: []}", "config.yaml:2: captures.keys: needs at least one entry, not a list"),
        (
            "captures: {keys: [alice], max: 0}\napi_keys: [{name: alice, key: k}]",
            "config.yaml:2: captures.max: must be more than 0 bytes",
        ),
        ("captures: [alice]", "config.yaml:2: captures: must be a mapping of settings, not a list"),
        ("ledger_keep: 0", "config.yaml:2: ledger_keep: must be longer than 0"),
    ],
)
def test_what_is_refused(refused, text, said):
    assert refused(HEAD + text) == [said]


def test_its_path(read, tmp_path):
    assert read(HEAD).ledger_path is None
    assert read(HEAD + "ledger: false").ledger_path is None
    assert read(HEAD + "ledger: null").ledger_path is None
    assert read(HEAD + "ledger: x/l.db").ledger_path == tmp_path / "x/l.db"
    assert read(HEAD + "ledger: /y/l.db").ledger_path.as_posix() == "/y/l.db"
    assert read(HEAD + "ledger: true\nstate: s/my.json").ledger_path == tmp_path / "s/my-ledger.db"
    beside = read(HEAD + "ledger: true")
    assert beside.ledger_path.parent == beside.state_path.parent


def test_what_is_probably_not_meant(read):
    gateway = "ledger: l.db\napi_keys: [{name: g, key: k, gateway: true, %s}]"
    assert read(HEAD + gateway % "remote: true").warnings == ()
    (said,) = read(HEAD + gateway % "models: [q]").warnings
    assert said.startswith("api_keys[0]: is a gateway's: its role, `models`")
    assert read(HEAD + "ledger: l.db\nprices: {models: {q: {input: 1}}}").warnings == ()
    assert read(HEAD + "prices: {models: {r: {input: 1}}}").warnings == (
        "prices: nothing is written down without `ledger`",
        "prices.models.r: no model has this name",
    )


FULL = """
models: {small-1: {port: 8001, wake: w, sleep: s, alive: a}, big: {port: 8002, wake: w, sleep: s, alive: a}}
ledger: l.db
prices: {currency: usd}
roles:
  free: {models: [small-*], limits: {requests: 60/m, tokens: [1.5k/s, 100k/d], concurrent: 4},
    budget: {usd: 5, per: day}}
api_keys:
  - {name: alice, key: k, role: free, models: ["*"], budget: {EUR: 2}}
"""


def test_roles(read):
    config = read(FULL.replace("EUR", "USD"))
    free = config.roles["free"]
    assert free.limits.requests == ((60, 60.0),)
    assert free.limits.tokens == ((1500, 1.0), (100_000, 86_400.0))
    assert (free.budget.amount, free.budget.currency, free.budget.per, free.budget.then) == (
        5,
        "usd",
        "day",
        "refuse",
    )
    assert config.api_keys[0].managed


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", "9: api_keys[0].budget: is in eur, but `prices.currency` is usd"),
        ("role: free", "role: fre", "9: api_keys[0].role: 'fre' is not one of `roles`: free"),
        (
            "[small-*]",
            "[tiny-*, big]",
            "6: roles.free.models[0]: 'tiny-*' matches no model; there are big, small-1",
        ),
        ("name: alice, ", "", "9: api_keys[0]: needs a `name`: what it uses is counted by that"),
        ("ledger: l.db", "", "7: roles.free.budget: needs `ledger`: what was spent is kept there"),
        (
            "prices: {currency: usd}",
            "",
            "7: roles.free.budget: needs `prices`: what a request costs is not known without them",
        ),
        (
            "requests: 60/m",
            "requests: 60",
            "6: roles.free.limits.requests: '60' is not a rate; write it as 60/m, 100k/d, or as a list of such",
        ),
        (
            "requests: 60/m",
            "requests: 0.1/m",
            "6: roles.free.limits.requests: '0.1/m' is not a rate; write it as 60/m, 100k/d, or as a list of such",
        ),
        ("concurrent: 4", "concurrent: 0", "6: roles.free.limits.concurrent: must be at least 1, not 0"),
        (
            "{usd: 5",
            "{usd: 5, eur: 3",
            "7: roles.free.budget: must say one amount with its currency, as {usd: 5, per: month}",
        ),
        ("{usd: 5", "{usd: -5", "7: roles.free.budget.amount: must be an amount from 0 on, as 0.90, not '-5'"),
        (
            "{usd: 5",
            "{dollars-: 5",
            "7: roles.free.budget.currency: 'dollars-' is not a currency; write two to eight letters, as usd",
        ),
        ("per: day", "per: year", "7: roles.free.budget.per: must be day or month, not 'year'"),
        ("per: day", "soft: 2", "7: roles.free.budget.soft: must be at most 1.0, not 2"),
    ],
)
def test_what_is_refused_of_roles(refused, old, new, said):
    text = FULL if not old else FULL.replace("EUR", "USD").replace(old, new)
    assert f"config.yaml:{said}" in refused(text)


def test_the_schema_takes_a_budget():
    budget = {"usd": 5, "per": "month", "soft": 0.8, "then": "awake_only"}
    model = {"port": 8001, "wake": "w", "sleep": "s", "alive": "a"}
    document = {"models": {"q": model}, "roles": {"free": {"budget": budget, "limits": {"requests": ["1/s"]}}}}
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(document)
    budget["then"] = "beg"
    assert not validator.is_valid(document)
