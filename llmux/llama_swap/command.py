"""llama-swap's commands, which no shell reads, as words for a shell.

llama-swap drops the lines that begin with ``#``, joins lines that end in a backslash, and splits what is left into
words by quotes and white space; ``$``, ``;`` or ``|`` mean nothing to it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from llmux.llama_swap.macros import without_comments
from llmux.llama_swap.marks import ANY, ENV, PORT

_ESCAPED_IN_QUOTES = '$`"\\'
_SPACE = " \t\n"


@dataclass(frozen=True, slots=True)
class Word:
    """One argument; ``bare`` when no quote or backslash stood in it."""

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
    """The rules of POSIX shells for quotes and backslashes, and none of their others."""

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
        raise ValueError(f"the quote that opens before {self.text[begin : begin + 20]!r} is never closed")


def shell(words: list[Word]) -> str:
    """Write words for a shell, each option on a line of its own."""
    lines: list[str] = []
    for word in words:
        written = quote(word)
        if not lines or written.startswith("-"):
            lines.append(written)
        else:
            lines[-1] += f" {written}"
    return " \\\n  ".join(lines)


def quote(word: Word) -> str:
    """Write one word for a shell; what is only known later as a variable of it."""
    variable = ENV.fullmatch(word.text)
    if variable and word.bare:
        return f"${variable[1]}"  # llama-swap, too, splits what such a variable holds into words
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
