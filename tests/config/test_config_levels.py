"""How deeply models may sleep."""

from __future__ import annotations

import pytest

from llmux.config import to_specs
from llmux.core.spec import Level

GIB = 2**30


def levels(config, name="a"):
    (spec,) = (spec for spec in to_specs(config)[0] if spec.name == name)
    return spec.levels


@pytest.mark.parametrize(
    "text",
    [
        "[1: 18GiB, 2: 512MiB, stop]",
        "{1: 18GiB, 2: 512MiB, stop: 0}",
        "[{'1': 19327352832}, {2: 512 MiB}, {stop: 0B}]",
    ],
)
def test_levels_are_named_with_what_they_take(read, model, text):
    config = read(f"host_memory: 40GiB\nmodels:\n  a: {model(f'port: 8001, levels: {text}')}\n")
    assert levels(config) == (Level("1", 18 * GIB), Level("2", GIB // 2), Level("stop"))
    assert to_specs(config)[1].host_memory == 40 * GIB
    assert config.warnings == ()


def test_without_a_size_they_take_nothing(read, model):
    config = read(f"models:\n  a: {model('port: 8001, levels: [nap]')}\n  b: {model('port: 8002')}\n")
    assert levels(config) == (Level("nap"),)
    assert levels(config, "b") == ()
    assert to_specs(config)[1].host_memory is None
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("top", "text", "line"),
    [
        ("", "ram", "must be a list of levels; write them lightest first, as [ram: 18GiB, disk]"),
        ("", "3", "must be a list of levels"),
        ("", "[true]", "True is not a name of a level"),
        ("", "[null]", "None is not a name of a level"),
        ("", "['']", "'' is not a name of a level"),
        ("", '["a\\nb"]', "'a\\nb' is not a name of a level"),
        ("", "[ram 18GiB, disk]", "'ram 18GiB' is not a name of a level (letters, digits, . _ -); write them"),
        ("", "[ram:18GiB, disk]", "'ram:18GiB' is not a name of a level"),
        ("", "[[ram]]", "['ram'] is not a name of a level"),
        ("", "[ram, ram]", "'ram' is there twice; keep one of them"),
        ("", "[1, '1']", "'1' is there twice"),
        ("", "[{ram: 1GiB, disk: 0}]", "an item holds 2 levels; write them lightest first"),
        ("", "[ram: 18G]", "ram: '18G' has an unknown unit 'G'; write GiB or GB"),
        ("", "[ram: null]", "ram: is not a size"),
        ("", "[disk, ram: 1GiB]", "'ram' takes 1GiB of host memory, more than 'disk' before it (0B)"),
        ("host_memory: 8GiB", "[ram, disk]", "take no host memory; with `host_memory`, say how much"),
        (
            "host_memory: 8GiB",
            "[ram: 18GiB]",
            "'ram', the deepest, takes 18GiB of a host memory of 8GiB: 10GiB too",
        ),
    ],
)
def test_what_is_refused(refused, model, top, text, line):
    (said,) = refused(f"{top}\nmodels:\n  a: {model(f'port: 8001, levels: {text}')}\n")
    assert f"models.a.levels: {line}" in said


def test_warnings(read, model):
    text = "models:\n  a: " + model("port: 8001, levels: [ram: 18, disk: 2]")
    assert read(text).warnings == (
        "models.a.levels.ram: is only 18 bytes; write a unit, as 18GiB",
        "models.a.levels.disk: is only 2 bytes; write a unit, as 2GiB",
        "models.a.levels: only the first is used without the top-level `host_memory` (and the last to clean up)",
    )
    two = [model(f"port: {port}, levels: [r: 9GiB, d: 5GiB]") for port in (1, 2)]
    both = f"models:\n  a: {two[0]}\n  b: {two[1]}\n"
    assert read(f"host_memory: 9GiB\n{both}").warnings == (
        "host_memory: 9GiB is not enough when all sleep: even at their deepest levels they take 10GiB",
    )
    assert read(f"host_memory: 9GiB\nmodels:\n  a: {model()}").warnings == (
        "host_memory: has no effect, as no model has `levels`",
    )
