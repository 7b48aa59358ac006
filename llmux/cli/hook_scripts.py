"""The hook scripts that come with llmux: which there are, what they say of themselves, and copying them.

A script reads what it has in common with others from ``lib/`` beside it. A copy has these parts in it, so that it
needs nothing but itself.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from llmux.config.model_settings import hook_folder
from llmux.errors import LLMuxError

EXECUTABLE = 0o755

_LIBRARY = re.compile(r'^lib=.*?^}\n((?:\. "\$lib/[a-z]+\.sh"\n)+)', re.MULTILINE | re.DOTALL)
_PART = re.compile(r"/([a-z]+\.sh)")
# As the library has them: on one line, or up to a brace at the beginning of one.
_FUNCTION = re.compile(r"^(\w+)\(\) \{(?:.*\}(?: #.*)?| #.*\n(?:.*\n)*?\}|\n(?:.*\n)*?\})\n\n?", re.MULTILINE)


class HookScriptError(LLMuxError):
    """There is no such script, or it cannot be copied there."""


@dataclass(frozen=True, slots=True)
class HookScript:
    """One script. Its summary and its example are read from its first lines."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        """The script as a file that is complete in itself: with those parts of the library that it uses.

        Raises:
            HookScriptError: a part is missing, or cannot be read.

        """
        try:
            return complete(self.path)
        except OSError as error:
            raise HookScriptError(f"{error.filename} cannot be read: {error.strerror}") from None

    @property
    def summary(self) -> str:
        """What it is for, in a sentence."""
        header = self._header()
        paragraph = " ".join(line.removeprefix("# ") for line in header[: header.index("#")])
        return re.split(r"(?<=[.?]) ", paragraph)[0]

    @property
    def example(self) -> str:
        """The lines of a configuration that use it, as its header has them, beginning with ``models:``."""
        lines = self._header()
        begin = lines.index("#   models:")
        end = lines.index("#", begin)
        return "\n".join(line.removeprefix("#   ") for line in lines[begin:end])

    @property
    def others(self) -> list[str]:
        """The names of other scripts that these lines use."""
        return sorted(set(re.findall(r"\./hooks/([a-z-]+)\.sh", self.example)) - {self.name})

    def example_in(self, folder: Path) -> str:
        """Return these lines for a copy in another folder than ``hooks``."""
        outside = folder.is_absolute() or folder.parts[:1] == ("..",)
        place = str(folder) if outside else "/".join((".", *folder.parts))

        def moved(line: re.Match[str]) -> str:
            key, script, rest = line.groups()
            path = f"{place.removesuffix('/')}/{script}"
            command = f"{shlex.quote(path)}{rest}"
            return key + (command if shlex.quote(path) == path else json.dumps(command, ensure_ascii=False))

        return re.sub(r"(?m)^( +[a-z]+: +)\./hooks/(\S+)(.*)$", moved, self.example)

    def _header(self) -> list[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines()[1:]
        end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        return lines[:end]


def shipped() -> dict[str, HookScript]:
    """Return the scripts by name, sorted."""
    files = sorted(_folder().glob("*.sh"), key=lambda file: file.stem)
    return {file.stem: HookScript(file.stem, file) for file in files}


def complete(path: Path) -> str:
    """Return the text of a script, with those functions of ``lib/`` that it uses where it reads them."""
    text = path.read_text(encoding="utf-8")
    found = _LIBRARY.search(text)
    if found is None:
        return text
    own = text[: found.start()] + text[found.end() :]
    parts = [(path.parent / "lib" / name).read_text(encoding="utf-8") for name in _PART.findall(found[1])]
    library = "\n".join(part.partition("\n")[2] for part in parts)  # without shellcheck's line
    return text[: found.start()] + _used(library, own) + text[found.end() :]


def _used(library: str, script: str) -> str:
    # Without the functions which neither the script nor another function that it needs names.
    functions = {found[1]: found[0] for found in _FUNCTION.finditer(library)}
    needed: set[str] = set()
    pending = [script, _FUNCTION.sub("", library)]
    while pending:
        named = functions.keys() & set(re.findall(r"\w+", pending.pop())) - needed
        needed |= named
        pending += [functions[name] for name in named]
    kept = _FUNCTION.sub(lambda found: found[0] if found[1] in needed else "", library)
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n") + "\n"


def find(name: str) -> HookScript:
    """Return a script by its name, with or without ``.sh``; HookScriptError names those that there are."""
    scripts = shipped()
    found = scripts.get(name.removesuffix(".sh"))
    if found is None:
        near = difflib.get_close_matches(name, scripts, n=1)
        mean = f" (did you mean {near[0]}?)" if near else ""
        raise HookScriptError(f"there is no hook script {name!r}{mean}; known: {', '.join(scripts)}")
    return found


def copy(name: str, folder: Path, *, force: bool = False) -> Path:
    """Copy a script into a folder, which is made if need be, and return where it is now.

    Where the script itself is there already, as in llmux's own folder, it stays. HookScriptError when there is
    none of that name, when another file has its place (unless ``force``), or when it cannot be written.
    """
    script = find(name)
    target = folder / script.path.name
    content = script.text.encode()
    try:
        if target.exists() and target.samefile(script.path):
            return target
        if target.exists() and target.read_bytes() != content and not force:
            raise HookScriptError(f"{target} exists and differs: move it away, or replace it with --force")
        folder.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(EXECUTABLE)
    except OSError as error:
        raise HookScriptError(f"{target} cannot be written: {error.strerror}") from None
    return target


def _folder() -> Path:
    return hook_folder()
