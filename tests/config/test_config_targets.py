"""Names beside the models' own: what is refused, and on which line."""

import pytest

from llmux.config.targets import leaves


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
        ("q", "'q' is already the name of a model; choose another"),
        ("other-name", "'other-name' is already an alias of q; choose another"),
    ],
)
def test_a_name_is_taken_once(refused, name, said):
    [line] = refused(variant("strip: [x]").replace("q:v", name))
    assert line == f"config.yaml:10: models.q.variants.{name}: {said}"


def test_two_models_have_no_variant_of_one_name(refused, model):
    with_it = model("port: 8001, variants: {v: {}}")
    [line] = refused(f"models:\n  a: {with_it}\n  b: {with_it.replace('8001', '8002')}\n")
    assert line == "config.yaml:3: models.b.variants.v: 'v' is already a variant of a; choose another"


def virtual(text):
    return (
        variant("strip: [x]")
        + f"""
        virtual:
          inner: {{first: [q]}}
          {text}
    """
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v: {awake: [q, r]}", "v.awake[1]: 'r' is not configured; name a model, an alias, a variant or another"),
        ("v: {awake: [q, iner]}", "v.awake[1]: 'iner' is not configured; did you mean 'inner'?"),
        ("v: {split: {q: 1, other-nme: 1}}", "v.split.other-nme: 'other-nme' is not configured; did you mean"),
        ("v: {first: [q, 'q:v', q]}", "v.first[2]: 'q' is there twice; keep one of them"),
        (
            "v: {ladder: [q, inner], floor: {a: 'q:v'}}",
            "v.floor.a: 'q:v' is not on the ladder; choose one of q, inner",
        ),
        ("v: {awake: [q], floor: {a: q}}", "v.floor: belongs to a `ladder`; remove it"),
        ("v: {first: [q], sticky: key}", "v.sticky: belongs to a `split`; remove it"),
        ("v: {}", "v: needs one of `awake`, `first`, `ladder` and `split`, and only one"),
        ("v: {awake: [q], first: [q]}", "v: needs one of `awake`, `first`, `ladder` and `split`, and only one"),
        ("v: {awake: []}", "v.awake: needs at least one entry"),
        ("v: {split: {}}", "v.split: needs at least one entry"),
        ("v: {split: {q: 0}}", "v.split.q: must be a number above 0: the target's share, as 90"),
        ("v: {split: {q: 1}, sticky: user}", "v.sticky: must be key or conversation, not 'user'"),
        ("v: {first: [v]}", "v: chooses from itself: v → v; take one out"),
        ("{v: {first: [w]}, w: {awake: [inner, v]}}", "v: chooses from itself: v → w → v; take one out"),
        ("q: {first: [other-name]}", "q: 'q' is already the name of a model; choose another"),
        ("'q:v': {first: [inner]}", "q:v: 'q:v' is already a variant of q; choose another"),
        ("other-name: {first: [inner]}", "other-name: 'other-name' is already an alias of q; choose another"),
        ("v: {awak: [q]}", "v.awak: unknown setting; did you mean `awake`?"),
    ],
)
def test_virtual_models_that_cannot_be_meant(refused, text, said):
    if text.startswith("{"):  # several, on one line
        text = text[1:-1].replace("}, ", "}\n          ")
    [line] = refused(virtual(text))
    assert line.startswith(f"config.yaml:15: virtual.{said}")


def test_a_floor_for_a_role_that_does_not_exist(refused):
    text = virtual("v: {ladder: [q, inner], floor: {fre: q, '*': inner}}") + "    roles: {free: {}}\n"
    [line] = refused(text)
    assert line == "config.yaml:15: virtual.v.floor.fre: 'fre' is not one of `roles`: free"


@pytest.mark.parametrize(("order", "line"), [(range(12), 19), (range(11, -1, -1), 22)])
def test_nesting_has_an_end_whatever_the_order(refused, order, line):
    deep = "\n          ".join([*(f"v{n}: {{first: [v{n + 1}, q]}}" for n in order), "v12: {first: [q]}"])
    [said] = refused(virtual(deep))
    way = " → ".join(f"v{n}" for n in range(4, 13))
    assert said == f"config.yaml:{line}: virtual.v4: is more than 8 virtual models deep: {way}"


def test_where_a_virtual_model_may_end(read):
    config = read(virtual("v: {ladder: [inner, 'q:v', other-name], floor: {'*': inner}}"))
    assert leaves(config, "v") == ("q",)
    assert config.virtual["v"].targets == ("inner", "q:v", "other-name")
    assert config.virtual["v"].kind == "ladder"


def test_what_is_right(read):
    config = read(variant("{set: {a.b: [1, {c: null}]}, default: {x: 0.5}, cap: {x: 1}, strip: [y]}"))
    assert config.variants == {"q:v": "q"}
    assert config.models["q"].variants["q:v"].set == {"a.b": [1, {"c": None}]}
    assert config.names == {"q": "q", "other-name": "q"}


@pytest.mark.parametrize(
    ("apis", "translated"),
    [
        ("null", False),
        ("[chat]", True),
        ("[messages, embeddings]", True),
        ("[chat, messages, responses]", False),
        ("[embeddings]", False),
    ],
)
def test_models_whose_engines_lack_a_dialect(read, model, apis, translated):
    config = read(f"models: {{a: {model(f'port: 8001, apis: {apis}, aliases: [x]')}, b: {model('port: 8002')}}}")
    assert config.translated == (frozenset("a") if translated else frozenset())


@pytest.mark.parametrize(
    ("apis", "said"),
    [
        ("[]", ".apis: needs at least one entry"),
        (
            "[chats]",
            ".apis[0]: must be chat, completions, messages, responses, embeddings or count_tokens, not 'chats'",
        ),
        ("chat", ".apis: must be a list, not 'chat'"),
    ],
)
def test_dialects_that_do_not_exist(refused, model, apis, said):
    [line] = refused(f"models:\n  a: {model(f'port: 8001, apis: {apis}')}\n")
    assert line.startswith(f"config.yaml:2: models.a{said}")
