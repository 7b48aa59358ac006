"""The control socket: how the ``llmux`` command on the same host gets in without a key.

With ``api_keys`` operating over TCP takes ``admin_key``, from loopback too: a proxy on the same host connects
from there for all of its clients. What only llmux's user (and root) can open is a Unix socket with mode 0600. It
is found by the port alone, as the command knows no more: ``3000.sock``, whatever ``state`` says, so that several
llmuxes on a host, or llmux without a state file, each have their own.

llmux takes the first of these folders that it can use, and the command looks into all of them:

1. ``$RUNTIME_DIRECTORY``, which systemd makes for a service (``RuntimeDirectory=llmux``: ``/run/llmux``);
2. ``$XDG_RUNTIME_DIR/llmux``, or ``/run/user/UID/llmux``;
3. ``$XDG_STATE_HOME/llmux``, or ``~/.local/state/llmux``, where the state files lie.

The socket is bound under a name of its own, given its mode, and listens, before it gets its final name: there it
never is anything but a socket of mode 0600 that answers. A socket whose llmux was killed refuses connections, and
the next one replaces it. Paths beyond the 107 bytes of a Unix address go through ``/proc/self/fd``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

BACKLOG = 128
_LONGEST = 100  # bytes of a path that is used as it is
_DEFAULT = frozenset({"", "localhost", "127.0.0.1", "0.0.0.0", "::"})  # noqa: S104 - recognised, not bound


def socket_name(host: str, port: int) -> str:
    """Return the file's name: by the port, and by the address where that is one of several."""
    host = host.lower()
    return f"{port}.sock" if host in _DEFAULT else f"{host.replace('/', '_')}_{port}.sock"


def folders(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield where llmux puts its socket, best first."""
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if os.path.isabs(runtime):  # noqa: PTH117 - what is not absolute is ignored, as XDG says
        yield Path(runtime)
    user = Path(environ.get("XDG_RUNTIME_DIR", ""))
    if not user.is_absolute():
        user = Path(f"/run/user/{os.getuid()}")
    if user.is_dir():
        yield user / "llmux"
    state = Path(environ.get("XDG_STATE_HOME", ""))
    with contextlib.suppress(RuntimeError):  # no home folder is known
        yield (state if state.is_absolute() else Path.home() / ".local" / "state") / "llmux"


def found(host: str, port: int, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield the sockets that may belong to the llmux that listens on a port of this host."""
    names = [socket_name(host, port)]
    if host.lower() == "localhost":
        names.append(socket_name("::1", port))
    seen = set()
    places = (*folders(environ), Path("/run/llmux"))
    for path in (folder / name for name in names for folder in places):
        if path not in seen:
            seen.add(path)
            with contextlib.suppress(OSError):
                owner = path.lstat()
                if stat.S_ISSOCK(owner.st_mode) and (owner.st_uid == os.getuid() or os.getuid() == 0):
                    yield path


@contextlib.contextmanager
def address_of(path: Path) -> Iterator[str]:
    """Give an address that a Unix socket takes for a path of any length, for as long as the block lasts."""
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def answers(path: Path) -> bool:
    """Whether something listens on a socket. One whose backlog is full does."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, address_of(path) as address:
            client.setblocking(False)
            client.connect(address)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


class ControlSocket:
    """A socket that listens, and its file. Whatever serves the listener closes it; ``close`` removes the file."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self.listener = listener
        self.path = path
        self._inode = path.lstat().st_ino

    def close(self) -> None:
        """Remove the file, unless another llmux has put its own in its place."""
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()


def open_control(host: str, port: int, environ: Mapping[str, str]) -> ControlSocket:
    """Listen for the commands of this host's user. Raises OSError: no folder can be used."""
    problems: list[str] = []
    for folder in folders(environ):
        try:
            return _open(folder, socket_name(host, port))
        except FileExistsError as error:
            if error.errno is None:
                raise
            problems.append(f"{folder}: {error.strerror}")
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise OSError("; ".join(problems) or "no folder is known: set XDG_RUNTIME_DIR")


def _open(folder: Path, name: str) -> ControlSocket:
    # What others may write to is not taken: they could put a socket of their own in our place.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid():
        raise OSError(f"belongs to the user {owner.st_uid}")
    if owner.st_mode & 0o022:
        raise OSError("others may write to it")
    _sweep(folder)
    path = folder / name
    if os.path.lexists(path) and answers(path):
        raise FileExistsError(f"another llmux listens on {path}")
    draft = path.with_name(f".{name}.{os.getpid()}")  # the number tells the next one whose it was
    draft.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _private(), address_of(draft) as address:
            listener.bind(address)
        draft.chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        draft.rename(path)
        return ControlSocket(listener, path)
    except OSError:
        listener.close()
        draft.unlink(missing_ok=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what killed llmuxes left behind: sockets, and what had yet to become one."""
    drafts = [path for path in folder.glob(".*.sock.*") if not _of_another(path.name.rpartition(".")[2])]
    for path in (*folder.glob("*.sock"), *drafts):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(path.lstat().st_mode) and not answers(path):
                path.unlink()


def _of_another(pid: str) -> bool:
    """Whether another process runs that has this number. One with our own was there before us."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return int(pid) != os.getpid()


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """Have files made in the block be for their owner only. No other thread makes any at the start."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
