"""One model's server: its address, and how hooks/process.sh starts and stops it.

llama-swap's commands are not read by a shell; they are converted to words for a shell.

llama-swap drops lines that begin with ``#``, joins lines that end in a backslash, and splits the rest into words
by quotes and white space; ``$``, ``;`` or ``|`` have no meaning.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from llmux.config.load import literal
from llmux.config.problems import Path
from llmux.config.setting_types import Address, parse_address
from llmux.llama_swap.source import ANY, ENV, ENV_OPEN, PORT, Model, Note, as_in_file, without_comments

_ESCAPED_IN_QUOTES = '$`"\\'
_SPACE = " \t\n"


@dataclass(frozen=True, slots=True)
class Word:
    """One argument; ``bare`` if it has no quote or backslash."""

    text: str
    bare: bool = True


def split(command: str) -> list[Word]:
    """Split a command into its words.

    Raises:
        ValueError: a quote is never closed.

    """
    return _Splitter(_joined(command)).words()


def _joined(command: str) -> str:
    lines = without_comments(command).split("\n")
    return "\n".join(f"{line.strip()[:-1]} " if line.strip().endswith("\\") else line for line in lines)


class _Splitter:
    """The rules of POSIX shells for quotes and backslashes, and no others."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def words(self) -> list[Word]:
        found: list[Word] = []
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at >= len(self.text):
                return found
            begin = self.at
            word = self.word()
            found.append(Word(word, bare=word == self.text[begin : self.at]))

    def word(self) -> str:
        word = ""
        while self.at < len(self.text) and self.text[self.at] not in _SPACE:
            character = self.text[self.at]
            self.at += 1
            if character == "\\":
                word += self.text[self.at : self.at + 1].replace("\n", "")
                self.at += 1
            elif character in "\"'":
                word += self.quoted(character)
            else:
                word += character
        return word

    def quoted(self, quote: str) -> str:
        begin, word = self.at, ""
        while self.at < len(self.text):
            character = self.text[self.at]
            self.at += 1
            if character == quote:
                return word
            following = self.text[self.at : self.at + 1]
            if quote == '"' and character == "\\" and following and following in _ESCAPED_IN_QUOTES + "\n":
                word += following.replace("\n", "")
                self.at += 1
            else:
                word += character
        following = as_in_file(self.text[begin : begin + 20])
        raise ValueError(f"the quote that opens before {following!r} is never closed")


def shell(words: list[Word]) -> str:
    """Format words for a shell, each option on a line of its own."""
    lines: list[str] = []
    for word in words:
        written = quote(word)
        if not lines or written.startswith("-"):
            lines.append(written)
        else:
            lines[-1] += f" {written}"
    return " \\\n  ".join(lines)


def quote(word: Word) -> str:
    """Format one word for a shell; values that are known only later as variables of it."""
    variable = ENV.fullmatch(word.text)
    if variable and word.bare:
        return f"${variable[1]}"  # llama-swap, too, splits the value of such a variable into words
    pieces, at = [], 0
    for mark in ANY.finditer(word.text):
        pieces += [word.text[at : mark.start()], _variable(mark[0])]
        at = mark.end()
    pieces.append(word.text[at:])
    # Every second piece is a variable.
    quoted = [piece if index % 2 else shlex.quote(piece) for index, piece in enumerate(pieces) if piece]
    return "".join(quoted) or "''"


def _variable(mark: str) -> str:
    name = ENV.fullmatch(mark)
    if name:
        return f'"${name[1]}"'
    return '"$LLMUX_PORT"' if mark == PORT else '"$pid"'


GRACE = 10  # seconds; the default of both llama-swap and hooks/process.sh
SHORTEST_WAKE = 15  # seconds; a shorter one in llama-swap counts as this
KILLING = 60  # seconds; more than hooks/process.sh needs for a second TERM and KILL
LONGEST_SLEEP = 300  # seconds; llmux's own limit for a sleep hook

_LOOPBACK = frozenset({"localhost", "127.0.0.1"})
_PORT_OPTION = re.compile(r"--(?:listen-)?port(?:=(\d+))?\Z")
# Variables that hooks/process.sh reads itself, or has, cannot be passed to the engine in the same way.
_PLAIN_NAME = re.compile(r"[A-Z_][A-Z0-9_]*\Z")
_TAKEN = frozenset(
    {
        "COMMAND", "STOP_COMMAND", "FOLDER", "HEALTH_PATH", "EXPECT", "EXPECT_PATH", "PORT", "URL", "GRACE",
        "PID_DIR", "LOG_DIR", "LOG_MIB", "ASK_SECONDS",
    }
)  # fmt: skip


def text(value: str) -> str:
    """Escape a text for llmux's file, where variables are filled in at load."""
    return ENV.sub(lambda found: f"${{{found[1]}}}", literal(value))


class Engine:
    """``address`` is None if llama-swap could not start or reach it either; the last of ``notes`` says why.

    llama-swap takes a file with such a model, and serves the others.
    """

    def __init__(self, name: str, model: Model, *, port: int | None, folder: FilePath) -> None:
        """Read ``model``. ``port`` is the value of ``${PORT}``; relative paths begin at ``folder``."""
        self.at: Path = ("models", name)
        self.model = model
        self.folder = folder
        self.notes: list[Note] = []
        self.command = self._words("cmd", model.cmd)
        self.stop = self._words("cmdStop", model.cmdStop)
        self.address = self._address(port) if self.command else None
        if self.address and (port != self.address.port):
            self.command, self.stop = _numbered(self.command, port), _numbered(self.stop, port)

    @property
    def where(self) -> dict[str, Any]:
        """``port`` or ``url``, as llmux's settings."""
        assert self.address is not None  # else the model would have been left out
        here = self.address.host in _LOOPBACK and not self.address.tls and not self.address.base_path
        return {"port": self.address.port} if here else {"url": literal(self.address.url)}

    def timeouts(self, health_check: int | None, grace: int) -> dict[str, str]:
        """How long the hooks may take, if that is not llmux's default."""
        timeouts = {}
        if health_check is not None:
            timeouts["wake"] = f"{max(health_check, SHORTEST_WAKE)}s"
        longest = 2 * grace + KILLING  # the script waits that long for `cmdStop`, then for TERM
        if longest > LONGEST_SLEEP:
            timeouts["sleep"] = f"{longest}s"
        return timeouts

    def env(self, grace: int) -> dict[str, str]:
        """The variables of hooks/process.sh and the engine."""
        plain: dict[str, str] = {}
        special: list[Word] = []
        for index, item in enumerate(self.model.env):
            name, equals, value = item.partition("=")
            if not equals or not name or "\0" in item:
                self.notes.append(Note((*self.at, "env", index), "is not NAME=value"))
            elif _PLAIN_NAME.match(name) and name not in _TAKEN and not name.startswith("LLMUX_"):
                plain[name] = text(value)
            else:
                special.append(Word(item, bare=False))
        before = [Word("env"), *special] if special else []
        settings = {"COMMAND": _script([*before, *self.command])}
        if self.stop:
            settings["STOP_COMMAND"] = _script([*before, *self.stop])
        health = self.model.checkEndpoint.strip()
        if health != "none" and not health.startswith("/"):
            health = f"/{health}"
        if health != "/health":
            settings["HEALTH_PATH"] = text(health)
        if grace not in (0, GRACE):
            settings["GRACE"] = str(grace)
        if self._is_relative():
            settings["FOLDER"] = text(str(self.folder))
        return settings | plain

    # ---- reading

    def _words(self, key: str, command: str) -> list[Word]:
        try:
            words = split(command)
        except ValueError as error:
            self.notes.append(Note((*self.at, key), str(error)))
            return []
        if not words and (key == "cmd" or command.strip()):
            given = key in self.model.model_fields_set
            self.notes.append(Note((*self.at, key) if given else self.at, "has no command"))
        return words

    def _address(self, port: int | None) -> Address | None:
        url = self.model.proxy or ("" if port is None else f"http://localhost:{port}")
        if not url or "${PORT}" in url:
            found = _port_option(self.command)
            if found is None:
                self.notes.append(
                    Note(self.at, "nothing says on which port it listens; use ${PORT} in `cmd`, or give `proxy`")
                )
                return None
            self.notes.append(
                Note(self.at, f"no `proxy` and no ${{PORT}} say where it listens; --port {found} does", lost=False)
            )
            url = url.replace("${PORT}", found) or f"http://localhost:{found}"
        try:
            return parse_address(url)
        except ValueError as error:
            self.notes.append(Note((*self.at, "proxy"), str(error)))
            return None

    def _is_relative(self) -> bool:
        """Whether the command depends on where it is started."""
        program = self.command[0].text
        if "/" in program and not program.startswith(("/", ENV_OPEN)):
            if not (self.folder / program).exists():
                said = f"is relative to where llama-swap was started; taken to be {self.folder}"
                self.notes.append(Note((*self.at, "cmd"), f"{as_in_file(program)!r} {said}", lost=False))
            return True
        values = [word.text.rpartition("=")[2] for word in self.command[1:]]
        return any("/" in value and value[0] != "/" and (self.folder / value).exists() for value in values)


def _port_option(words: list[Word]) -> str | None:
    for index, word in enumerate(words):
        option = _PORT_OPTION.match(word.text)
        if option:
            value = option[1] or (words[index + 1].text if index + 1 < len(words) else "")
            return value if value.isdecimal() else None
    return None


def _numbered(words: list[Word], port: int | None) -> list[Word]:
    """Write ``${PORT}`` as a number, if the engine is reached on another port."""
    return [Word(word.text.replace(PORT, str(port)), word.bare) for word in words]


def _script(words: list[Word]) -> str:
    return literal(shell(words))  # the shell fills in its own variables
