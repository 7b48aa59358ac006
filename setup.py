"""What is compiled, where there is a C compiler: llmux works without it. All else is in pyproject.toml."""

import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LINUX = sys.platform == "linux"
ONE_FOR_ALL = LINUX and not sysconfig.get_config_var("Py_GIL_DISABLED")  # setuptools refuses it there
RELAY = Extension(
    "llmux.upstream.native_linux",
    ["llmux/upstream/native.c"],
    extra_compile_args=["-std=c11", "-O2", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)
TALLY = Extension(
    "llmux.accounts._tally",
    ["llmux/accounts/tally.c"],
    extra_compile_args=["-std=c11", "-O2"],
    py_limited_api=True,
    optional=True,
)


class Build(build_ext):
    """Gives the relay a name that no module has: it is loaded with ctypes, and knows nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return where one is put."""
        if not fullname.endswith("native_linux"):
            return str(super().get_ext_filename(fullname))
        return f"{fullname.replace('.', '/').replace('native_linux', 'native.linux')}.so"


setup(
    ext_modules=[RELAY, *([TALLY] if ONE_FOR_ALL else [])] if LINUX else [],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ONE_FOR_ALL else {},
)
