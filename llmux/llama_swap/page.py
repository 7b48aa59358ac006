"""The configuration as a file that people read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import yaml

from llmux.llama_swap.settings import Note
from llmux.llama_swap.translation import Settings, Translation

WIDTH = 115
SCRIPT = "process"
"""The name of the hook script that starts and ends what llama-swap did."""

_ORDER = (
    "port", "url", "upstream_model", "aliases", "shared_address", "max_in_flight", "idle_sleep", "preload",
    "timeouts", "env",
)  # fmt: skip
_HOOKS = f"""\
x-hooks: &hooks
  wake: ./hooks/{SCRIPT}.sh wake
  sleep: ./hooks/{SCRIPT}.sh sleep
  alive: ./hooks/{SCRIPT}.sh alive
  stop: ./hooks/{SCRIPT}.sh stop
"""
_POLICY = """\
# As llama-swap switches: when the awake model is idle. Without this line llmux's default decides: `adaptive`
# weighs what waits against what a switch costs; `llmux simulate` compares them.
policy: {use: idle}
"""


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and lists within mappings indented."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 (its signature)
        return super().increase_indent(flow, indentless=False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def page(translation: Translation) -> str:
    """Return the text of the file."""
    return "\n".join(_parts(translation))


def _parts(translation: Translation) -> Iterator[str]:
    yield _notes(_head(translation))
    yield _yaml(translation.settings)
    if "policy" not in translation.settings:
        yield _POLICY
    if translation.groups:
        said = [note for note in translation.notes if _place(note, translation) == "groups"]
        yield _notes(map(str, said)) + _yaml({"groups": translation.groups})
    yield _HOOKS
    yield "models:\n" + "\n".join(
        textwrap.indent(_model(name, settings, translation.notes), "  ")
        for name, settings in translation.models.items()
    )


def _head(translation: Translation) -> Iterator[str]:
    yield f"Made by `llmux import llama-swap` from {translation.file.name}."
    yield (
        "llmux listens on this machine only; `host: 0.0.0.0` (and `api_keys`) open it. llama-swap's own address"
        " is not in its file."
    )
    if translation.variables:
        yield f"Its environment has to hold {', '.join(translation.variables)}."
    elsewhere = [note for note in translation.notes if _place(note, translation) == "head"]
    if elsewhere:
        yield ""
        yield from map(str, elsewhere)


def _place(note: Note, translation: Translation) -> str:
    """Say where a note stands: with its model, with the groups, or above all."""
    section, *rest = note.path
    if section == "models" and rest and rest[0] in translation.models:
        return "models"
    return "groups" if translation.groups and section in ("groups", "matrix", "routing") else "head"


def _model(name: str, settings: Settings, notes: Iterable[Note]) -> str:
    mine = [str(replace(note, path=note.path[2:])) for note in notes if note.path[:2] == ("models", name)]
    ordered = {key: settings[key] for key in _ORDER if key in settings}
    key = _yaml({name: 0}).rpartition(":")[0]
    body = textwrap.indent(f"<<: *hooks\n{_yaml(ordered)}", "  ")
    return f"{_notes(mine)}{key}:\n{body}"


def _notes(lines: Iterable[str]) -> str:
    return "".join(_comment(lines))


def _comment(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        # What is not printable, a line break among it, must not end the comment.
        plain = "".join(character if character.isprintable() else "?" for character in line)
        for piece in textwrap.wrap(plain, WIDTH - 10, break_long_words=False, break_on_hyphens=False) or [""]:
            yield f"# {piece}".rstrip() + "\n"


def _yaml(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    written: str = yaml.dump(
        dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False
    )
    return written
