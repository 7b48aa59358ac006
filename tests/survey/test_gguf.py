"""GGUF files: where they are looked for, and what they say of themselves."""

import os
import struct
import time

import pytest

from examples.quickstart.tiny_gguf import cached
from llmux.survey import model_files as gguf
from tests.engine.real import TINY
from tests.survey.conftest import write_gguf

MODEL = {
    "general.architecture": "qwen3",
    "general.type": "model",
    "general.tags": ["a", "b"],
    "qwen3.block_count": 2,
}


def names(found):
    return [model.name for model in found.models]


def test_a_real_one():
    model = gguf.read(cached(TINY))
    assert (model.architecture, model.size) == ("llama", cached(TINY).stat().st_size)


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, ".cache/huggingface/hub/models--a--b/snapshots/1234"),
        ({"HF_HOME": "HOME/hf"}, "hf/hub/x"),
        ({"HF_HUB_CACHE": "HOME/hub"}, "hub/x"),
        ({"XDG_CACHE_HOME": "HOME/c"}, "c/huggingface/hub/x"),
        ({}, ".cache/llama.cpp"),
        ({"LLAMA_CACHE": "HOME/lc"}, "lc"),
        ({}, ".lmstudio/models/publisher/model"),
        ({}, ".cache/lm-studio/models/publisher/model"),
        ({}, "models/deep/er/still"),
    ],
)
def test_places(tmp_path, environ, place):
    write_gguf(tmp_path / place / "Qwen3-8B-Q4_K_M.gguf", MODEL)
    write_gguf(tmp_path / "elsewhere" / "x.gguf", MODEL)
    environ = {name: value.replace("HOME", str(tmp_path)) for name, value in environ.items()}
    assert names(gguf.find(environ, tmp_path)) == ["Qwen3-8B-Q4_K_M"]


def test_the_same_file_by_two_ways_is_one(tmp_path):
    blob = write_gguf(tmp_path / ".cache/huggingface/hub/models--a--b/blobs/abcdef", MODEL)
    for place in (".cache/huggingface/hub/models--a--b/snapshots/1", "models"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.gguf").symlink_to(blob)
    found = gguf.find({}, tmp_path)
    assert [model.path.parent.name for model in found.models] == ["1"]


def test_a_model_in_parts_is_one_of_their_size(tmp_path):
    for part in (1, 2, 3):
        write_gguf(tmp_path / "models" / f"big-{part:05}-of-00003.gguf", MODEL if part == 1 else {}, size=1000)
    write_gguf(tmp_path / "models" / "big-code-00001-of-00001.GGUF", MODEL, size=700)
    write_gguf(tmp_path / "models" / "big-other.gguf", MODEL, size=500)
    assert [(model.name, model.size) for model in gguf.find({}, tmp_path).models] == [
        ("big", 3000),
        ("big-code", 700),
        ("big-other", 500),
    ]
    assert gguf.read(tmp_path / "models" / "big-code-00001-of-00001.GGUF").size == 700


def test_a_model_in_parts_that_are_not_all_whole_is_none(tmp_path):
    models = tmp_path / "models"
    parts = [models / f"big-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    for part in parts:
        write_gguf(part, MODEL if part == parts[0] else {})
    parts[2].rename(models / "elsewhere")
    found = gguf.find({}, tmp_path)
    assert (found.models, found.broken) == ([], parts[:1])
    assert gguf.read(parts[0]) is None
    parts[2].write_bytes(b"GGUF")
    assert (found := gguf.find({}, tmp_path)).models == []
    assert found.broken == parts[:1]
    (models / "elsewhere").replace(parts[2])
    parts[0].unlink()
    found = gguf.find({}, tmp_path)
    assert (found.models, found.broken) == ([], parts[1:2])


def test_what_is_no_model_by_itself(tmp_path):
    models = tmp_path / "models"
    write_gguf(models / "mmproj.gguf", {"general.architecture": "clip"})
    write_gguf(models / "projector.gguf", {"general.architecture": "x", "general.type": "mmproj"})
    write_gguf(models / "lora.gguf", {"general.architecture": "llama", "general.type": "adapter"})
    (models / "text.gguf").write_text("not a model")
    (models / "empty.gguf").write_bytes(b"")
    (models / "dangling.gguf").symlink_to("nowhere")
    (models / "itself.gguf").symlink_to("itself.gguf")
    (models / "folder.gguf").mkdir()
    os.mkfifo(models / "pipe.gguf")
    found = gguf.find({}, tmp_path)
    assert (names(found), found.broken) == ([], [models / "empty.gguf", models / "text.gguf"])


def test_a_file_that_ends_within_its_own_description_is_no_model(tmp_path):
    file = tmp_path / "models" / "x.gguf"
    whole = write_gguf(file, {"general.architecture": "qwen3"}).read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        found = gguf.find({}, tmp_path)
        assert (found.models, found.broken) == ([], [file]), size
        assert gguf.read(file) is None
    file.write_bytes(whole)
    assert names(gguf.find({}, tmp_path)) == ["x"]


@pytest.mark.parametrize("inner", [4, 8, 9])  # numbers, texts, arrays
@pytest.mark.parametrize("count", [2**40, 2**62, 2**64 - 1])
def test_an_array_that_claims_to_be_endless(tmp_path, inner, count):
    def text(said):
        return struct.pack("<Q", len(said)) + said

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + text(b"general.tags") + struct.pack("<IIQ", 9, inner, count)
    file = tmp_path / "models" / "x.gguf"
    file.parent.mkdir()
    file.write_bytes(head + b"\0" * 70_000)
    assert names(gguf.find({}, tmp_path)) == ["x"]


def test_a_key_that_claims_to_be_endless(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + b"\3\0\0\0" + b"\xff" * 100)
    assert gguf.read(file) is None
    file.write_bytes(file.read_bytes().ljust(gguf._HEAD + 1, b"\xff"))  # not all of it was read
    assert gguf.read(file).architecture == ""


@pytest.mark.parametrize(
    ("name", "architecture", "options"),
    [
        ("Qwen3-8B", "qwen3", []),
        ("nomic-embed-text-v1.5", "nomic-bert", ["--embedding"]),
        ("some-model", "bert", ["--embedding"]),
        ("Qwen3-Embedding-0.6B", "qwen3", ["--embedding"]),
        ("bge-reranker-v2-m3", "bert", ["--reranking"]),
    ],
)
def test_what_the_server_has_to_be_told(tmp_path, name, architecture, options):
    write_gguf(tmp_path / f"{name}.gguf", {"general.architecture": architecture})
    assert gguf.read(tmp_path / f"{name}.gguf").options == options


def test_a_projector_beside_the_only_model_belongs_to_it(tmp_path):
    models = tmp_path / "models"
    write_gguf(models / "gemma.gguf", MODEL)
    projector = write_gguf(models / "mmproj-F16.gguf", {"general.architecture": "clip"})
    (model,) = gguf.find({}, tmp_path).models
    assert model.options == ["--mmproj", str(projector)]
    write_gguf(models / "mmproj-BF16.gguf", {"general.architecture": "clip"})  # which of the two?
    (model,) = gguf.find({}, tmp_path).models
    assert model.options == []


def test_a_home_with_millions_of_files_is_not_searched_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MOST_ENTRIES", 10)
    for number in range(6):
        for other in range(3):
            (tmp_path / "models" / str(number)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "models" / str(number) / str(other)).touch()
    write_gguf(tmp_path / "models" / "zzz" / "x.gguf", MODEL)
    found = gguf.find({}, tmp_path)
    assert (names(found), found.cut) == ([], [tmp_path / "models"])


def test_a_link_to_above_ends(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "loop").symlink_to(tmp_path)
    write_gguf(tmp_path / "models" / "x.gguf", MODEL)
    assert names(gguf.find({}, tmp_path)) == ["x"]


def test_the_folder_one_is_in_comes_first_and_is_found_once(tmp_path):
    models, other = tmp_path / "models", tmp_path / "other"
    write_gguf(models / "deep" / "a.gguf", MODEL)
    write_gguf(models / "b.gguf", MODEL)
    write_gguf(other / "c.gguf", MODEL)
    write_gguf(other / "deep" / "d.gguf", MODEL)
    assert sorted(names(gguf.find({}, tmp_path, models))) == ["a", "b"]
    assert sorted(names(gguf.find({}, tmp_path, other))) == ["a", "b", "c"]
    assert names(gguf.find({}, tmp_path, other))[0] == "c"


def test_thousands_in_one_folder_take_no_longer_each_than_a_few(tmp_path, monkeypatch):
    """Each was compared with each: 10,000 took minutes."""
    first = write_gguf(tmp_path / "models" / "m.gguf", MODEL)
    for number in range(2000):
        (tmp_path / "models" / f"m{number}.gguf").hardlink_to(first)
    said = {"general.architecture": "qwen3"}
    monkeypatch.setattr(gguf, "_kind", lambda _path: said)
    asked = []
    monkeypatch.setattr(gguf, "_is_projector", asked.append)
    before = time.thread_time()
    found = gguf.find({}, tmp_path)
    assert time.thread_time() - before < 1
    assert len(found.models) == 2001
    assert len(asked) <= 2 * 2001
