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


class Build(build_ext):
    """Gives it a name that no module has: it is loaded with ctypes, knows nothing of Python, and fits each."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return where it is put."""
        return f"{fullname.replace('.', '/').replace('native_linux', 'native.linux')}.so"


setup(
    ext_modules=[RELAY] if LINUX else [],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ONE_FOR_ALL else {},
)
