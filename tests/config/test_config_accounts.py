"""Where the accounts are kept, and what is refused there."""

import pytest

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
            "config.yaml:2: prices.currency: '$' is no currency; write two to eight letters, as usd",
        ),
        (
            "prices:\n  models:\n    q: {in: 1}",
            "config.yaml:4: prices.models.q.in: unknown setting; known here: input, cached, output",
        ),
        ("charge: {switch: me}", "config.yaml:2: charge.switch: must be causers, everyone or house, not 'me'"),
        (
            "api_keys: [{name: (house), key: k}]",
            "config.yaml:2: api_keys[0].name: '(house)' stands for what no key pays; choose another",
        ),
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
    assert read(HEAD + "ledger: l.db\nprices: {models: {q: {input: 1}}}").warnings == ()
    assert read(HEAD + "prices: {models: {r: {input: 1}}}").warnings == (
        "prices: nothing is written down without `ledger`",
        "prices.models.r: no model has this name",
    )
