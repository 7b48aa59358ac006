"""Writing a configuration that a command has made, and the hook scripts beside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from llmux.cli.hook_scripts import HookScript, copy, find
from llmux.config import Config
from llmux.errors import ConfigError, LLMuxError

CONFIG = "config.yaml"
HOOKS = "hooks"
_PRIVATE, _PUBLIC = 0o600, 0o644


class UnwrittenError(LLMuxError):
    """Nothing was written."""


def write(
    text: str,
    folder: Path,
    scripts: Iterable[str],
    *,
    force: bool = False,
    unset: Iterable[str] = (),
    spare: Path | None = None,
) -> Path:
    """Write ``folder``/config.yaml and copy the hook scripts beside it, once llmux itself has taken the text.

    Nothing is there half: the configuration appears when all else is done. ``unset`` are variables that need not
    be set yet; ``spare`` is a file that not even ``force`` overwrites.

    Raises:
        UnwrittenError: something is there already, cannot be written, or llmux does not take it.
        HookScriptError: a script that differs is there already, or cannot be written.

    """
    target = folder / CONFIG
    if spare is not None and target.exists() and target.samefile(spare):
        raise UnwrittenError(f"{target} is the file that is read; name another folder")
    if target.exists() and not force:
        raise UnwrittenError(f"{target} is there already; name another folder, or overwrite it with --force")
    scripts = list(scripts)
    own = [path for name in scripts if _differs(path := folder / HOOKS / f"{name}.sh", find(name))]
    if own and not force:
        names = " and ".join(map(str, own))
        raise UnwrittenError(f"{names}: there already, and not as it comes with llmux; keep it, or use --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{CONFIG}.", suffix=".yaml", dir=folder)
    except OSError as error:
        raise UnwrittenError(f"{target} cannot be written: {error.strerror}") from None
    draft = Path(name)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        config = _taken(draft, unset)
        for script in scripts:
            copy(script, folder / HOOKS, force=force)
        secret = config.api_keys or config.admin_key or any(each.key for each in config.remotes.values())
        draft.chmod(_PRIVATE if secret else _PUBLIC & ~_umask())
        draft.replace(target)
    except OSError as error:
        raise UnwrittenError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
    return target


def _differs(path: Path, script: HookScript) -> bool:
    try:
        return not path.samefile(script.path) and path.read_bytes() != script.text.encode()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a folder, or not readable
        return True


def _taken(draft: Path, unset: Iterable[str]) -> Config:
    environ = {**dict.fromkeys(unset, "unset"), **os.environ}
    try:
        return Config.from_file(draft, environ=environ)
    except ConfigError as error:
        problems = getattr(error, "problems", (error,))
        said = "\n".join(f"  {problem.path}: {problem.message}" for problem in problems)
        raise UnwrittenError(f"llmux would not take the result:\n{said}") from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
