"""prefetch.sh: what it reads, and what it leaves alone."""

import mmap
import os
import random
import shutil
import subprocess

import pytest

from tests.engine.real import ROOT
from tests.harness.page_cache import drop, resident
from tests.harness.waiting import PATIENCE

SCRIPT = ROOT / "hooks" / "prefetch.sh"
PAGES = 40


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a file which is not in the page cache."""

    def make(name: str):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random.randbytes(PAGES * mmap.PAGESIZE))
        try:
            drop(path)
        except SystemExit as error:  # a tmpfs is nothing but page cache
            pytest.skip(str(error))
        return path

    return make


@pytest.fixture(params=["sh", "bash"])
def prefetch(request, tmp_path):
    def prefetch(*arguments, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [shutil.which(request.param), SCRIPT, *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **env},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return prefetch


def test_it_reads_the_model(make, prefetch):
    weights, other = make("weights of mine.gguf"), make("other.gguf")
    done = prefetch(MODEL=str(weights))
    assert done.returncode == 0, done.stderr
    assert "1 MiB read" in done.stdout
    assert resident(weights) == 1
    assert resident(other) < 1


def test_it_reads_what_the_command_names_in_place_of_the_model(make, prefetch):
    one, two, model = make("1.safetensors"), make("2.safetensors"), make("model.gguf")
    assert prefetch(one, two, MODEL=str(model)).returncode == 0
    assert resident(one) == resident(two) == 1
    assert resident(model) < 1


def test_it_reads_a_folder_of_links(make, prefetch, tmp_path):
    # As in the cache of Hugging Face's hub.
    blob = make("blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    assert prefetch(MODEL=str(snapshot)).returncode == 0
    assert resident(blob) == 1


def test_it_reads_all_parts_of_a_model_in_parts(make, prefetch):
    parts = [make(f"my model-0000{n}-of-00003.gguf") for n in (1, 2, 3)]
    other = make("my model-00001-of-00002.gguf")
    assert prefetch(MODEL=str(parts[0])).returncode == 0
    assert [resident(part) for part in parts] == [1, 1, 1]
    assert resident(other) < 1


def test_what_does_not_fit_is_left_alone_and_that_is_no_failure(make, prefetch):
    weights = make("weights.gguf")
    done = prefetch(MODEL=str(weights), KEEP_FREE=str(1 << 30))
    assert done.returncode == 0
    assert "not read: 1 MiB" in done.stdout
    assert resident(weights) < 1


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MODEL": ""}, "MODEL is not set"),
        ({"MODEL": "/none/such.gguf"}, "cannot be read: /none"),
        ({"MODEL": "/", "KEEP_FREE": "2GiB"}, "KEEP_FREE is no whole number: 2GiB"),
    ],
)
def test_nonsense_is_said_to_be_nonsense(prefetch, env, said):
    done = prefetch(**env)
    assert done.returncode == 2
    assert said in done.stderr


def test_without_anything_to_be_polite_with_it_still_reads(make, prefetch, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cat", "find", "ls"):
        (tools / tool).symlink_to(shutil.which(tool))
    weights = make("weights.gguf")
    done = prefetch(MODEL=str(weights), PATH=str(tools))
    assert done.returncode == 0, done.stderr
    assert resident(weights) == 1
