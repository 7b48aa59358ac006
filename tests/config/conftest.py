import textwrap

import pytest

from llmux.config import Config, ConfigErrors

HOOKS = "wake: ./w, sleep: ./s, alive: ./a"


@pytest.fixture
def read(tmp_path):
    """Load a configuration from text; `M(8001)` stands for a model with that port."""

    def load(text, *, name="config.yaml", environ=None):
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return Config.from_file(tmp_path / name, environ=environ or {})

    return load


@pytest.fixture
def refused(read, tmp_path):
    """Load a configuration that must be refused; return the lines that say why, without the folder."""

    def load(text, **more):
        with pytest.raises(ConfigErrors) as caught:
            read(text, **more)
        assert len(caught.value.problems) == len(str(caught.value).splitlines())
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return load


@pytest.fixture
def model():
    """Return the YAML (flow) text of a model."""
    return lambda more="port: 8001": f"{{{HOOKS}, {more}}}"
