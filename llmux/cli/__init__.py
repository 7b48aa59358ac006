"""The command line."""

import signal
import threading

# An interrupt while the commands are imported ends the process like any other, without a traceback.
_OWN = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _OWN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from llmux.cli.command_tree import app, main  # noqa: E402

if _OWN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["app", "main"]
