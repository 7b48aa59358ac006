import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmux.config import Config
from llmux.plugins import known_policies, load_policy

ROOT = Path(__file__).parents[2]
README = ROOT / "policies" / "README.md"
TITLED = re.compile(r"```\w+\n(# ([\w.]+)\n.*?)```", re.DOTALL)  # a block whose first line is its file's name
FILES = {name: text for text, name in TITLED.findall(README.read_text())}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_guide_has_a_policy_a_configuration_and_a_test():
    assert set(FILES) == {"patient.py", "config.yaml", "test_patient.py"}


def test_the_guides_policy_loads_from_the_guides_configuration(folder):
    config = Config.from_file(folder / "config.yaml")
    policy = load_policy(config.policy.use, config.policy.options, config.folder)
    assert policy.patience == 45.0


def test_the_guides_test_passes_as_written(folder):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_patient.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_every_shipped_policy_is_in_the_guide():
    shipped = list(dict.fromkeys(re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)))
    assert shipped == known_policies()
