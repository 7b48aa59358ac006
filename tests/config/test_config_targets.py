"""Names beside the models' own: what is refused, and on which line."""

import pytest


def variant(text):
    return f"""
        models:
          q:
            port: 8001
            wake: w
            sleep: s
            alive: a
            aliases: [other-name]
            variants:
              "q:v":
                {text}
        """


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cap: {max_tokens: x}", ".cap.max_tokens: must be a number, as 1024: what the field is at most"),
        ("cap: {max_tokens: true}", ".cap.max_tokens: must be a number, as 1024: what the field is at most"),
        ("cap: {max_tokens: .nan}", ".cap.max_tokens: must be a number, as 1024: what the field is at most"),
        ("set: {a..b: 1}", ".set.a..b: 'a..b' is not a field of a request"),
        ("set: {'': 1}", ".set.: '' is not a field of a request"),
        ("strip: [model]", ".strip[0]: `model` chooses the variant"),
        ("set: {x: .inf}", ".set.x: is not a value that JSON has"),
        ("default: {x: null}", ".default.x: is null, which is the same as no value; remove it"),
        ("{set: {x: 1}, cap: {x: 1}}", ".cap.x: x is under `set` already; keep one of them"),
        ("{set: {x: 1}, strip: [x]}", ".strip[0]: x is under `set` already; keep one of them"),
        ("{set: {x: 1, x.y: 1}}", ".set.x.y: x.y and x, which is under `set`, overlap; keep one of them"),
        ("{set: {x.y: 1}, strip: [x]}", ".strip[0]: x and x.y, which is under `set`, overlap; keep one of them"),
        ("{default: {x: 9}, cap: {x: 1}}", ".cap.x: the default of x is not a number up to this"),
        ("{default: {x: y}, cap: {x: 1}}", ".cap.x: the default of x is not a number up to this"),
        ("sets: {x: 1}", ".sets: unknown setting; did you mean `set`?"),
    ],
)
def test_rules_that_cannot_be_meant(refused, text, said):
    [line] = refused(variant(text))
    assert line.startswith(f"config.yaml:11: models.q.variants.q:v{said}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("q", "'q' is the name of a model; choose another"),
        ("other-name", "'other-name' is an alias of q; choose another"),
    ],
)
def test_a_name_is_taken_once(refused, name, said):
    [line] = refused(variant("strip: [x]").replace("q:v", name))
    assert line == f"config.yaml:10: models.q.variants.{name}: {said}"


def test_two_models_have_no_variant_of_one_name(refused, model):
    with_it = model("port: 8001, variants: {v: {}}")
    [line] = refused(f"models:\n  a: {with_it}\n  b: {with_it.replace('8001', '8002')}\n")
    assert line == "config.yaml:3: models.b.variants.v: 'v' is already a variant of a; choose another"


def test_what_is_right(read):
    config = read(variant("{set: {a.b: [1, {c: null}]}, default: {x: 0.5}, cap: {x: 1}, strip: [y]}"))
    assert config.variants == {"q:v": "q"}
    assert config.models["q"].variants["q:v"].set == {"a.b": [1, {"c": None}]}
    assert config.names == {"q": "q", "other-name": "q"}
