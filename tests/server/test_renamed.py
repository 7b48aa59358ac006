"""The old names of modules, which a user's own policy may import."""

import importlib
import sys

import pytest

import llmux
from llmux import renamed


@pytest.mark.parametrize("old", sorted(renamed.RENAMED))
def test_an_old_name_works_with_a_warning(old, monkeypatch):
    new = importlib.import_module(renamed.RENAMED[old])
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new.__name__};"):
        module = importlib.import_module(old)
    monkeypatch.delitem(sys.modules, old)
    public = {name: value for name, value in vars(new).items() if not name.startswith("_")}
    assert public.items() <= vars(module).items()


def test_what_a_folder_has_left_behind_is_not_taken_for_it(monkeypatch, tmp_path):
    (tmp_path / "tracing" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(llmux, "__path__", [*llmux.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llmux.tracing", raising=False)
    with pytest.warns(DeprecationWarning, match=r"llmux\.tracing is now llmux\.observability;"):
        importlib.import_module("llmux.tracing")
    monkeypatch.delitem(sys.modules, "llmux.tracing")


def test_the_names_that_a_policy_imports_are_the_same_objects():
    with pytest.warns(DeprecationWarning, match="is now llmux.config.setting_types;"):
        old = importlib.reload(importlib.import_module("llmux.config.sizes"))
    assert old.parse_size is importlib.import_module("llmux.config.setting_types").parse_size


def test_what_a_module_had_is_in_the_one_that_it_is_now():
    with pytest.warns(DeprecationWarning, match="is now"):
        old = importlib.reload(importlib.import_module("llmux.simulator.beside"))
    assert callable(old.answer)
    assert callable(old.main)


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"llmux\.config\.nothing"):
        importlib.import_module("llmux.config.nothing")
