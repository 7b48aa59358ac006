"""Who may be awake beside whom: memory of several GPUs, and groups."""

from __future__ import annotations

import pytest

from llmux.config import to_specs
from llmux.core.residency import fits

GIB = 2**30


def models(model, **settings):
    return "models:\n" + "".join(
        f"  {name}: {model(f'port: {8001 + number}{more}')}\n"
        for number, (name, more) in enumerate(settings.items())
    )


def memories(config):
    return {spec.name: spec.memory for spec in to_specs(config)[0]}


def together(config, *names):
    specs, rules = to_specs(config)
    return fits([spec for spec in specs if spec.name in names], rules.capacity)


def test_memory_is_spread_evenly_over_the_gpus_or_given_for_each(read, model):
    text = "gpus: {0: 24GiB, 1: 24GiB}\n" + models(
        model,
        a=", memory: 10GiB, gpus: [0]",
        b=", memory: 16GiB, gpus: [0, 1]",
        c=", memory: {0: 10GiB, 1: 6GiB}",
        d=", memory: 3B, gpus: ['1', '0']",
    )
    config = read(text)
    assert memories(config) == {
        "a": {"0": 10 * GIB},
        "b": {"0": 8 * GIB, "1": 8 * GIB},
        "c": {"0": 10 * GIB, "1": 6 * GIB},
        "d": {"1": 2, "0": 1},
    }
    assert to_specs(config)[1].capacity == {"0": 24 * GIB, "1": 24 * GIB}
    assert together(config, "a", "b")
    assert not together(config, "a", "b", "c")


def test_with_one_gpu_nobody_has_to_name_it(read, model):
    assert memories(read("gpus: {7: 24GiB}\n" + models(model, a=", memory: 10GiB"))) == {"a": {"7": 10 * GIB}}


@pytest.mark.parametrize(
    ("top", "settings", "line"),
    [
        (
            "gpus: {0: 8GiB}",
            ", memory: 10GiB",
            "models.a.memory: 10GiB does not fit into the 8GiB of GPU 0: 2GiB too much",
        ),
        (
            "gpus: {0: 16GiB, 1: 8GiB}",
            ", memory: 18GiB, gpus: [0, 1]",
            "models.a.memory: 9GiB does not fit into the 8GiB",
        ),
        (
            "gpus: {0: 8GiB, 1: 8GiB}",
            ", memory: 1GiB",
            "models.a.memory: is on which GPU? Give `gpus`, a list out of 0, 1",
        ),
        ("gpus: {0: 8GiB}", ", memory: 1GiB, gpus: [1]", "models.a.gpus[0]: '1' is not one of `gpus`: 0"),
        ("gpus: {0: 8GiB}", ", memory: 1GiB, gpus: [0, 0]", "models.a.gpus[1]: '0' is there twice"),
        ("gpus: {0: 8GiB}", ", memory: {1: 1GiB}", "models.a.memory: names GPU '1', which is not one of `gpus`"),
        (
            "gpus: {0: 8GiB, 1: 8GiB}",
            ", memory: {1: 1GiB}, gpus: [0]",
            "models.a.memory: names GPU '1', which is not one of the model's own `gpus`",
        ),
        (
            "gpus: {0: 8GiB}",
            "",
            "gpus: needs the `memory` of every model; missing for a; give it, or remove `gpus`",
        ),
        ("gpus: {0: 8GiB}\ncapacity: 8GiB", ", memory: 1GiB", "gpus: is there beside `capacity`"),
        ("capacity: 8GiB", ", memory: {0: 1GiB}", "models.a.memory: names a GPU; give `gpus` at the top level"),
        (
            "capacity: 8GiB",
            ", memory: 1GiB, gpus: [0]",
            "models.a.gpus: names a GPU; give `gpus` at the top level",
        ),
        ("gpus: {0: lots}", "", "gpus.0: 'lots' is not a size"),
        ("port: 3000", ", memory: {0: 1GiB}", "models.a.memory: names a GPU; say at the top level"),
        ("groups: {g: {}}", "", "groups.g.models: is missing"),
        ("groups: {g: {models: []}}", "", "groups.g.models: needs at least one entry"),
        ("groups: {g: {models: [aa]}}", "", "groups.g.models[0]: 'aa' is not a model; did you mean 'a'?"),
        ("groups: {g: {models: [zz]}}", "", "groups.g.models[0]: 'zz' is not a model; name one of `models`"),
        (
            "groups: {g: {models: [x]}}",
            ", aliases: [x]",
            "groups.g.models[0]: 'x' is not a model; it is an alias of 'a'",
        ),
        ("groups: {g: {models: [a, a]}}", "", "groups.g.models[1]: 'a' is there twice"),
        (
            "groups: {g: {models: [a], swap: true}}",
            "",
            "groups.g.swap: unknown setting; known here: models, together",
        ),
    ],
)
def test_what_is_refused(refused, model, top, settings, line):
    (said,) = refused(f"{top}\n{models(model, a=settings)}")
    assert said.partition(": ")[2].startswith(line), said


GROUPED = """
    small: {models: [s1, s2], together: true}
    big: {models: [b1, b2]}
"""


def grouped(read, model, groups):
    return read(f"groups:{groups}{models(model, s1='', s2='', b1='', b2='', other='')}")


def test_a_group_that_is_together_and_groups_that_exclude_each_other(read, model):
    config = grouped(read, model, GROUPED)
    assert together(config, "s1", "s2")
    assert not together(config, "b1", "b2")
    assert not together(config, "s1", "b1")
    assert not together(config, "s1", "other")  # in no group: a group of its own


def test_groups_that_are_not_exclusive_may_be_awake_together(read, model):
    config = grouped(read, model, GROUPED.replace("}", ", exclusive: false}"))
    assert together(config, "s1", "s2", "b1")
    assert not together(config, "b1", "b2")
    assert not together(config, "s1", "other")


def test_one_exclusive_group_is_enough_to_keep_two_apart(read, model):
    config = grouped(read, model, GROUPED.replace("[b1, b2]", "[b1, b2], exclusive: false"))
    assert not together(config, "s1", "b1")


def test_a_persistent_group_makes_room_for_nobody(read, model):
    config = grouped(read, model, GROUPED.replace("true", "true, persistent: true"))
    assert together(config, "s1", "s2", "b1")
    assert together(config, "s1", "s2", "other")
    assert not together(config, "b1", "other")


def test_sets_that_share_a_model(read, model):
    groups = """
    one: {models: [b1, s1], together: true}
    two: {models: [b2, s1], together: true}
"""
    config = grouped(read, model, groups)
    assert together(config, "b1", "s1")
    assert together(config, "b2", "s1")
    assert not together(config, "b1", "b2")


def test_without_groups_nothing_is_said_about_companions(read, model):
    config = read(models(model, a="", b=""))
    assert [spec.companions for spec in to_specs(config)[0]] == [None, None]
    assert not together(config, "a", "b")


def test_groups_and_memory_both_have_to_allow_it(read, model):
    text = "capacity: 10GiB\ngroups: {g: {models: [a, b, c], together: true}}\n"
    config = read(text + models(model, a=", memory: 4GiB", b=", memory: 4GiB", c=", memory: 8GiB"))
    assert together(config, "a", "b")
    assert not together(config, "a", "c")


def test_what_comes_back_by_itself(read, model):
    text = "idle_sleep: 10m\ndefault_model: a\ndefault_after: 90s\n"
    specs, rules = to_specs(read(text + models(model, a="", b=", keep_awake: true, idle_sleep: null")))
    assert (rules.default_model, rules.default_after) == ("a", 90.0)
    assert [(spec.keep_awake, spec.idle_sleep) for spec in specs] == [(False, 600.0), (True, None)]
    assert to_specs(read(models(model, a="")))[1].default_model is None


def test_warnings(read, model):
    config = read("gpus: {0: 24}\n" + models(model, a=", memory: {0: 18}"))
    assert config.warnings == (
        "gpus.0: is only 24 bytes; write a unit, as 24GiB",
        "models.a.memory.0: is only 18 bytes; write a unit, as 18GiB",
    )
