import os
import sys

import pytest

from llmux.errors import PolicyLoadError
from llmux.plugins import known_policies, load_policy

GOOD = """
from pydantic import BaseModel, Field
from llmux.core.policy import Stay

class Mine:
    class Options(BaseModel):
        patience: float = Field(default=1.0, ge=0)
        words: dict[str, int] = {}
    def __init__(self, options):
        self.options = options
    def decide(self, now):
        return Stay()
"""
PLAIN = "class Plain:\n    def decide(self, now): return None\n"


@pytest.fixture(autouse=True)
def clean_imports():
    before, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def refused(tmp_path):
    """Load a policy that must be refused; return what is said."""

    def load(use, options=None, source=None):
        if source is not None:
            (tmp_path / "mine.py").write_text(source)
        with pytest.raises(PolicyLoadError) as caught:
            load_policy(use, options or {}, tmp_path)
        return str(caught.value)

    return load


def test_a_shipped_policy_by_name(tmp_path):
    assert type(load_policy("fifo", {}, tmp_path)).__name__ == "Fifo"
    assert "fifo" in known_policies()
    assert not [name for name in known_policies() if name.startswith("_")]


@pytest.mark.parametrize("use", ["./mine.py:Mine", "mine.py:Mine", "./mine.py", "mine:Mine"])
def test_a_policy_of_the_users_own(tmp_path, use):
    (tmp_path / "mine.py").write_text(GOOD)
    assert load_policy(use, {"patience": "2.5"}, tmp_path).options.patience == 2.5


def test_an_absolute_path(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    assert load_policy(f"{tmp_path}/mine.py:Mine", {}, tmp_path / "elsewhere").options.patience == 1.0


def test_a_file_is_read_anew(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    load_policy("./mine.py:Mine", {}, tmp_path)
    (tmp_path / "mine.py").write_text(GOOD.replace("default=1.0", "default=2.0"))
    assert load_policy("./mine.py:Mine", {}, tmp_path).options.patience == 2.0


def test_a_policy_may_import_its_neighbour_and_use_dataclasses(tmp_path):
    (tmp_path / "neighbour.py").write_text("ANSWER = 42\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour import ANSWER\n"
        "@dataclass\nclass Mine:\n    answer: int = ANSWER\n    def decide(self, now): return None\n"
    )
    assert load_policy("./mine.py:Mine", {}, tmp_path).answer == 42


@pytest.mark.parametrize("place", ["neighbour.py", "neighbour/__init__.py", "neighbour/inner.py"])
def test_what_a_policy_imports_from_its_folder_is_read_anew_and_nothing_else(tmp_path, place):
    (tmp_path / "neighbour").mkdir()
    neighbour = tmp_path / place
    if place.endswith("inner.py"):
        (tmp_path / "neighbour" / "__init__.py").write_text("")
    name = "neighbour.inner" if place.endswith("inner.py") else "neighbour"
    (tmp_path / "mine.py").write_text(
        f"import llmux, colorsys\nfrom {name} import ANSWER\nclass Mine:\n    answer = ANSWER\n"
        "    def decide(self, now): return None\n"
    )
    (tmp_path / "colorsys.py").write_text("hidden = True\n")  # of Python's own name: not ours

    def answer():
        return load_policy("./mine.py:Mine", {}, tmp_path).answer

    neighbour.write_text("ANSWER = 1\n")
    assert answer() == 1
    first = sys.modules[name], sys.modules["colorsys"], sys.modules["llmux"]
    neighbour.write_text("ANSWER = 'two'\n")
    assert answer() == "two"
    second = sys.modules[name], sys.modules["colorsys"], sys.modules["llmux"]
    assert second[0] is not first[0]
    assert second[1:] == first[1:]
    neighbour.write_text("ANSWER = 3 +\n")
    with pytest.raises(PolicyLoadError, match="SyntaxError"):
        answer()
    assert (sys.modules[name], sys.modules["colorsys"], sys.modules["llmux"]) == second
    neighbour.write_text("ANSWER = 'again'\n")
    assert answer() == "again"
    del sys.modules[name]


def test_a_neighbour_is_read_anew_within_the_same_second_and_without_an_init_file(tmp_path):
    (tmp_path / "neighbours").mkdir()
    neighbour = tmp_path / "neighbours" / "inner.py"
    (tmp_path / "mine.py").write_text(
        "from neighbours.inner import ANSWER\nclass Mine:\n    answer = ANSWER\n"
        "    def decide(self, now): return None\n"
    )
    try:
        for answer in (1, 2):
            neighbour.write_text(f"ANSWER = {answer}\n")
            os.utime(neighbour, (1e9, 1e9))  # of the same size, too: bytecode of the other would fit
            assert load_policy("./mine.py:Mine", {}, tmp_path).answer == answer
    finally:
        for name in ("neighbours.inner", "neighbours"):
            sys.modules.pop(name, None)


def test_an_imported_class_is_not_taken_for_the_files_own(tmp_path):
    (tmp_path / "other.py").write_text(PLAIN)
    (tmp_path / "mine.py").write_text(f"from other import Plain\nfrom llmux.core.policy import Policy\n{GOOD}")
    assert type(load_policy("./mine.py", {}, tmp_path)).__name__ == "Mine"


@pytest.mark.parametrize(
    ("use", "source", "words"),
    [
        ("fifp", None, ["did you mean fifo?", "known: adaptive, "]),
        ("", None, ["write a shipped NAME"]),
        ("a b", None, ["write a shipped NAME"]),
        ("./gone.py:X", None, ["there is no file", "gone.py"]),
        (f"./{'x' * 256}.py:X", None, ["there is no file"]),
        ("gone.module:X", None, ["there is no module gone"]),
        ("mine.gone:X", GOOD, ["there is no module mine.gone"]),
        ("mine: X", GOOD, ["not a name of a class"]),
        ("1x:X", None, ["not a name of a module"]),
        ("./mine.py:Other", GOOD, ["there is no Other", "there are: Mine"]),
        ("./mine.py:Other", "x = 1", ["no class with a `decide` method"]),
        ("./mine.py", "x = 1", ["no class with a `decide` method"]),
        ("./mine.py", GOOD + PLAIN, ["several policies", ":Mine or :Plain"]),
        ("./mine.py:x", "x = 1", ["not a class but a int"]),
        ("./mine.py:Mine", "class Mine: pass", ["no `decide` method"]),
        ("./mine.py:Mine", "class Mine:\n    decide = 3", ["no `decide` method"]),
        ("./mine.py:Mine", "class Mine:\n    async def decide(self, now): ...", ["may not be `async`"]),
        ("./mine.py:Mine", "class Mine:\n    def decide(self): ...", ["decide()", "is given the snapshot"]),
        (
            "./mine.py:Mine",
            "class Mine:\n    def __init__(self, x): ...\n    def decide(self, now): ...",
            ["constructor is given nothing"],
        ),
        (
            "./mine.py:Mine",
            "class Mine:\n    def __init__(self):\n        self.x = 1 / 0\n    def decide(self, now): ...",
            ["cannot be made", "mine.py:3: self.x = 1 / 0: ZeroDivisionError"],
        ),
        (
            "./mine.py:Mine",
            "class Mine:\n    def __init__(self):\n        raise SystemExit(4)\n    def decide(self, now): ...",
            ["cannot be made", "mine.py:3", "SystemExit: 4"],
        ),
        ("./mine.py:Mine", "x = 1\ny = {}['a']\n", ["mine.py:2: y = {}['a']: KeyError: 'a'"]),
        ("./mine.py:Mine", "import json\nx = json.loads('[')\n", ["mine.py:2: x = json.loads('[')"]),
        ("./mine.py:Mine", "def decide(:\n", ["mine.py:1", "SyntaxError"]),
        ("./mine.py:Mine", "import no_such_thing\n", ["mine.py:1", "No module named 'no_such_thing'"]),
        ("./mine.py:Mine", "raise SystemExit('go')", ["SystemExit: go"]),
        ("mine:Mine", "import no_such_thing\n", ["mine.py:1", "No module named 'no_such_thing'"]),
        ("llmux.core.policy:Policy", None, ["abstract"]),
    ],
)
def test_what_cannot_be_loaded_says_why(refused, use, source, words):
    message = refused(use, source=source)
    assert message.startswith("policy.use: ")
    for word in words:
        assert word in message


def test_a_failed_import_leaves_nothing_behind(refused):
    before = set(sys.modules)
    refused("./mine.py:Mine", source="1 / 0")
    assert not {name for name in set(sys.modules) - before if name.startswith("llmux_policy")}


def test_options_where_none_are_taken(refused):
    assert refused("fifo", {"patience": 3}) == "policy.options.patience: fifo takes no options; remove it"


def test_every_wrong_option_is_said(refused):
    message = refused("./mine.py:Mine", {"patience": -1, "words": {"a": "b"}, "patiense": 3, "zz": 1}, GOOD)
    assert message.splitlines() == [
        "policy.options.patiense: unknown option; did you mean `patience`?",
        "policy.options.zz: unknown option; known: patience, words",
        "policy.options.patience: input should be greater than or equal to 0",
        "policy.options.words.a: input should be a valid integer, unable to parse string as an integer",
    ]


def test_an_options_model_may_allow_anything(tmp_path):
    (tmp_path / "mine.py").write_text(
        GOOD.replace("        patience", '        model_config = {"extra": "allow"}\n        patience')
    )
    assert load_policy("./mine.py:Mine", {"zz": 1}, tmp_path).options.zz == 1


def test_names_that_have_moved_can_be_imported_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"llmux\.core\.policy_memory is now llmux\.policies\.adaptive"):
        from llmux.core.policy_memory import Memory  # noqa: PLC0415
    with pytest.warns(DeprecationWarning, match=r"llmux\.core\.transitions is now llmux\.core\.policy"):
        from llmux.core.transitions import Successor  # noqa: PLC0415
    assert (Memory.__name__, Successor.__name__) == ("Memory", "Successor")
    with pytest.raises(ImportError, match="Nothing"):
        from llmux.core.policy_memory import Nothing  # noqa: F401, PLC0415
