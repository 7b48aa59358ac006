"""GPUs, containers and programs: real programs on the PATH, which say what the real ones say."""

import os

import pytest

from llmux.survey import host as machine
from llmux.survey.host import Container, Gpu, look


@pytest.fixture
def program(tmp_path):
    """Put a program on a PATH of its own."""
    (tmp_path / "bin").mkdir()

    def program(name, script):
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return {"PATH": f"{tmp_path / 'bin'}:/nowhere"}

    return program


def test_a_bare_machine(tmp_path):
    here = look({"PATH": "/nowhere"}, tmp_path)
    assert (here.programs, here.gpus, here.containers, here.ollama_store, here.said) == ({}, [], [], None, {})


def test_gpus(program, tmp_path):
    environ = program(
        "nvidia-smi",
        """case "$*" in *--query-gpu=index,name,memory.total*) ;; *) exit 9 ;; esac
        echo "0, NVIDIA GeForce RTX 4090, 24564"
        echo "1, NVIDIA, Inc. X, 81559"; echo "2, NVIDIA GB10, [N/A]" """,
    )
    gpus = look(environ, tmp_path).gpus
    assert gpus == [Gpu("0", "NVIDIA GeForce RTX 4090", 24564 * 2**20), Gpu("1", "NVIDIA, Inc. X", 81559 * 2**20)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "NVIDIA-SMI has failed"),
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        ("exit 1", "failed with exit code 1"),
        ("exec sleep 60", "did not answer within 0.2 s"),
    ],
)
def test_a_driver_that_is_broken_or_hangs(program, tmp_path, monkeypatch, script, said):
    monkeypatch.setattr(machine, "SECONDS", 0.2)
    environ = program("nvidia-smi", script)
    here = look({"PATH": f"{environ['PATH']}:{os.environ['PATH']}"}, tmp_path)
    assert (here.gpus, here.said["nvidia-smi"]) == ([], said)


def test_a_program_that_cannot_be_run(program, tmp_path):
    environ = program("nvidia-smi", "")
    (tmp_path / "bin" / "nvidia-smi").write_bytes(b"\x7fELF nonsense")
    assert "cannot be run" in look(environ, tmp_path).said["nvidia-smi"]


def test_containers(program, tmp_path):
    environ = program(
        "docker",
        r"""cat <<'EOF'
{"Names":"vllm","Image":"vllm/vllm-openai:latest","Ports":"0.0.0.0:8000->8000/tcp, [::]:8000->8000/tcp"}
{"Names":"quiet","Image":"alpine","Ports":""}
no JSON
{"Names":5}
EOF""",
    )
    here = look(environ | {"PATH": f"{environ['PATH']}:{os.environ['PATH']}"}, tmp_path)
    assert here.containers == [
        Container("vllm", "vllm/vllm-openai:latest", (8000,)),
        Container("quiet", "alpine", ()),
    ]
    assert here.container_at(8000).name == "vllm"
    assert here.container_at(8001) is None


@pytest.mark.parametrize("given", [True, False])
def test_ollamas_store(tmp_path, given):
    store = tmp_path / ("there" if given else ".ollama/models")
    (store / "manifests").mkdir(parents=True)
    environ = {"PATH": "/nowhere"} | ({"OLLAMA_MODELS": str(store)} if given else {})
    assert look(environ, tmp_path).ollama_store == store
