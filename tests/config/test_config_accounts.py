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
