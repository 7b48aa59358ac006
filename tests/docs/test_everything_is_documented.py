"""What users can set, script against or run into has to be written down."""

from __future__ import annotations

import inspect
import re

import typer.main

from llmux import errors
from llmux.accounts.key_metrics import HELP as KEY_HELP
from llmux.cli import app
from llmux.config import Config
from llmux.config.gateway import GatewayConfig
from llmux.config.reference import settings, settings_table
from llmux.core.effects import Refusal
from llmux.core.spec import HookKind
from llmux.gateway.views import HELP as FLEET_HELP
from llmux.observability.log import CATALOGUE
from llmux.observability.metrics import HELP
from tests.docs.pages import ROOT, code_words, text_of, undocumented

SOURCES = sorted((ROOT / "llmux").rglob("*.py"))
HOOK_VARIABLE = re.compile(r"""["'](LLMUX_(?:MODEL|HOOK|PORT|URL|SWITCH_ID|FROM|TO|[A-Z_]+))["']""")


def error_classes() -> list[type[errors.LLMuxError]]:
    return [
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.LLMuxError) and value.__module__ == errors.__name__
    ]


def test_settings_stand_under_their_full_path():
    paths = {setting.path for root in (Config, GatewayConfig) for setting in settings(root)}
    assert paths
    assert not undocumented(paths)


def test_settings_have_a_description():
    roots = (Config, GatewayConfig)
    assert not [each.path for root in roots for each in settings(root) if not each.description]


def test_the_table_of_settings_is_up_to_date():
    assert settings_table().strip() in text_of(), "paste the output of `llmux.config.reference.settings_table()`"


def test_hook_variables():
    names = {name for source in SOURCES for name in HOOK_VARIABLE.findall(source.read_text())}
    assert {"LLMUX_MODEL", "LLMUX_HOOK", "LLMUX_PORT", "LLMUX_URL"} <= names
    assert not undocumented(names)
    for_hooks = {
        name for name in names if re.fullmatch("LLMUX_(MODEL|HOOK|PORT|URL|SWITCH_ID|FROM|TO|SLEEP_LEVEL)", name)
    }
    assert not undocumented(for_hooks, "hooks/README.md")


def test_hooks():
    assert not undocumented(set(HookKind), "hooks/README.md")


def test_metrics():
    assert not undocumented(HELP | KEY_HELP | FLEET_HELP)


def test_no_metric_is_without_a_help_text():
    assert all(HELP.values())
    named = {
        name
        for source in (ROOT / "llmux" / "observability").glob("*.py")
        for name in re.findall(r'"(llmux_[a-z_]+)"', source.read_text())
    }
    assert named <= set(HELP)


def test_log_events():
    assert not undocumented(CATALOGUE)


def test_every_event_that_is_logged_is_in_the_catalogue():
    logged = {
        name
        for source in SOURCES
        for name in re.findall(
            r'\blog\.(?:event|debug|info|warning|error|exception)\(\s*"([a-z_]+)"', source.read_text()
        )
    }
    assert logged <= CATALOGUE.keys()


def test_error_classes_are_in_the_tree_at_the_top_of_their_module():
    tree = errors.__doc__
    assert not [error.__name__ for error in error_classes() if error.__name__ not in tree]


def test_error_codes():
    codes = {error.code for error in error_classes() if issubclass(error, errors.RequestError)}
    assert not undocumented((codes | set(Refusal)) - {"internal_error"})


def test_statuses_of_errors():
    statuses = {error.status for error in error_classes() if issubclass(error, errors.RequestError)}
    assert not [status for status in sorted(statuses) if not re.search(rf"\b{status}\b", text_of())]


def test_commands_and_their_options():
    root = typer.main.get_command(app)
    pending, words = [("llmux", root)], code_words(text_of())
    missing = []
    while pending:
        name, command = pending.pop()
        if name != "llmux" and name not in words and name not in text_of():
            missing.append(name)
        if not command.help:
            missing.append(f"{name}: no help text")
        pending += [(f"{name} {sub}", inner) for sub, inner in getattr(command, "commands", {}).items()]
    assert not missing


def test_shipped_policies_and_hooks():
    for folder, page in (("policies", "policies/README.md"), ("hooks", "hooks/README.md")):
        files = [path for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".sh")]
        missing = [path.name for path in files if path.name[0] != "_" and path.stem not in text_of(page)]
        assert not missing, page
