"""From a name to a target, by what the models do at the moment."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.config import Config
from llmux.targets.resolution import Ask, Names, Reason, Target

MODELS = ("big", "mid", "small")
FAR = "r/far"


@dataclass
class Seen:
    """What there is to see: which are awake, which one is being woken, and what waits and switches would take."""

    up: tuple[str, ...] = ()
    coming: str = ""
    waits: dict[str, float | None] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    leaves: bool = True
    only_up: bool = False

    def awake(self, model):
        return model in self.up

    def allowed(self, model):
        return model in self.up if self.only_up else model != FAR or self.leaves

    def waking(self, model):
        return model == self.coming

    def wait(self, model):
        if not self.allowed(model):
            return None
        return self.waits.get(model, 0.0 if model in self.up else 10.0)

    def switch_cost(self, model):
        return self.costs.get(model, 10.0)


def names(**virtual):
    one = {"wake": "w", "sleep": "s", "alive": "a"}
    models = {name: {**one, "port": 8001 + at} for at, name in enumerate(MODELS)}
    models["mid"]["aliases"] = ["middle"]
    models["mid"]["variants"] = {"mid:low": {"cap": {"max_tokens": 9}}}
    remotes = {"r": {"url": "https://r.example", "models": {"far": "theirs"}}}
    return Names(Config(models=models, virtual=virtual, remotes=remotes, state=None))


def chosen(what, name="v", ask=None, **seen):
    found = what.resolve(name, ask or Ask(), Seen(**seen))
    return found.target.name, found.reason


def test_names_that_leave_nothing_to_choose():
    plain = names()
    assert chosen(plain, "big") == ("big", Reason.NAMED)
    assert chosen(plain, "middle") == ("mid", Reason.NAMED)
    assert chosen(plain, "mid:low") == ("mid:low", Reason.VARIANT)
    assert plain.resolve("mid:low", Ask(), Seen()).target == Target("mid", "mid:low")
    assert "mid:low" in plain
    assert "v" not in plain


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({}, ("big", Reason.FIRST)),
        ({"up": ("mid",)}, ("mid", Reason.AWAKE)),
        ({"up": ("mid", "small")}, ("mid", Reason.AWAKE)),
        ({"up": ("small",), "coming": "mid"}, ("small", Reason.AWAKE)),
        ({"coming": "small"}, ("small", Reason.WAKING)),
        ({"waits": {"big": None}}, ("mid", Reason.FIRST)),
        ({"waits": dict.fromkeys(MODELS)}, ("big", Reason.NONE_SERVES)),
    ],
)
def test_awake(seen, expected):
    assert chosen(names(v={"awake": ["big", "middle", "small"]}), **seen) == expected


@pytest.mark.parametrize(
    ("seen", "expected", "others"),
    [
        ({}, ("big", Reason.FIRST), ["mid:low", "small"]),
        ({"up": ("small",)}, ("big", Reason.FIRST), ["mid:low", "small"]),
        ({"waits": {"big": None}}, ("mid:low", Reason.FIRST), ["small"]),
        ({"waits": dict.fromkeys(MODELS)}, ("big", Reason.NONE_SERVES), ["mid:low", "small"]),
    ],
)
def test_first(seen, expected, others):
    what = names(v={"first": ["big", "mid:low", "small"]})
    assert chosen(what, **seen) == expected
    assert [target.name for target in what.resolve("v", Ask(), Seen(**seen)).others] == others


LADDER = {"ladder": ["big", "mid", "small"], "floor": {"free": "small", "vip": "big", "*": "mid"}}


@pytest.mark.parametrize(
    ("role", "seen", "expected"),
    [
        (None, {"up": ("mid", "small")}, ("mid", Reason.AWAKE)),
        (None, {"up": ("big", "mid")}, ("big", Reason.AWAKE)),
        # below the floor it does not count that it is awake
        (None, {"up": ("small",)}, ("big", Reason.SHORTEST_WAIT)),
        ("free", {"up": ("small",)}, ("small", Reason.AWAKE)),
        ("vip", {"up": ("small", "mid")}, ("big", Reason.SHORTEST_WAIT)),
        ("unheard-of", {"up": ("small",)}, ("big", Reason.SHORTEST_WAIT)),
        ("free", {"waits": {"big": 9, "mid": 3, "small": 5}}, ("mid", Reason.SHORTEST_WAIT)),
        ("free", {"waits": {"big": 9, "mid": None, "small": 5}}, ("small", Reason.SHORTEST_WAIT)),
        # of equal waits the smaller switch, then the better rung
        ("free", {"costs": {"small": 1}}, ("small", Reason.SHORTEST_WAIT)),
        ("free", {}, ("big", Reason.SHORTEST_WAIT)),
        ("free", {"waits": dict.fromkeys(MODELS)}, ("big", Reason.NONE_SERVES)),
    ],
)
def test_ladder(role, seen, expected):
    assert chosen(names(v=LADDER), ask=Ask(role=role), **seen) == expected


def test_a_ladder_without_a_floor_goes_down_to_its_last_rung():
    what = names(v={"ladder": list(MODELS), "floor": {"vip": "big"}})
    assert chosen(what, up=("small",)) == ("small", Reason.AWAKE)
    assert chosen(what, ask=Ask(role="vip"), up=("small",)) == ("big", Reason.SHORTEST_WAIT)


SPLIT = {"split": {"big": 90, "small": 10}}


def test_split_by_dice_where_nothing_else_decides():
    what = names(v=SPLIT)
    draws = Counter(chosen(what, ask=Ask(draw=n / 1000)) for n in range(1000))
    assert draws == {("big", Reason.SPLIT): 900, ("small", Reason.SPLIT): 100}


@pytest.mark.parametrize(("sticky", "by"), [("key", "key"), ("conversation", "conversation")])
def test_split_stays_with_a_key_or_a_conversation(sticky, by):
    what = names(v={**SPLIT, "sticky": sticky}, w={**SPLIT, "sticky": sticky})
    first = [chosen(what, ask=Ask(**{by: str(n)}, draw=0.99)) for n in range(2000)]
    assert first == [chosen(what, ask=Ask(**{by: str(n)}, draw=0.0)) for n in range(2000)]
    assert 120 < Counter(first)["small", Reason.SPLIT] < 280
    # Two splits do not give the same callers the short end.
    assert first != [chosen(what, "w", ask=Ask(**{by: str(n)})) for n in range(2000)]


def test_without_a_key_a_split_stays_with_the_conversation():
    what = names(v={**SPLIT, "sticky": "key"})
    ask = Ask(conversation="c", draw=0.999)
    assert {chosen(what, ask=ask), chosen(what, ask=Ask(conversation="c"))} == {chosen(what, ask=ask)}


@pytest.mark.parametrize(
    ("virtual", "seen", "keeps"),
    [
        ({"awake": ["big", "small"]}, {"up": ("big", "small")}, True),
        ({"awake": ["big", "small"]}, {"up": ("big",)}, False),
        ({"ladder": ["big", "small"]}, {"up": ("big", "small")}, True),
        ({"ladder": ["big", "small"], "floor": {"*": "big"}}, {"up": ("big", "small")}, False),
        ({"first": ["big", "small"]}, {}, True),
        ({"first": ["big", "small"]}, {"waits": {"small": None}}, False),
        ({"split": {"big": 1, "small": 1e-9}}, {}, True),
        ({"awake": ["big", "mid"]}, {"up": ("big", "small")}, False),
        ({"awake": ["big", "inner"]}, {"up": ("big", "small")}, True),
    ],
)
def test_a_conversation_keeps_its_target_as_long_as_that_serves(virtual, seen, keeps):
    what = names(v=virtual, inner={"first": ["small"]})
    name, reason = chosen(what, ask=Ask(conversation="c", kept=Target("small")), **seen)
    assert (name, reason is Reason.CONVERSATION) == (("small", True) if keeps else ("big", False))


def test_after_a_kept_target_come_those_behind_it():
    what = names(v={"first": ["big", "mid", "small"]})
    found = what.resolve("v", Ask(kept=Target("mid")), Seen())
    assert [target.name for target in found.others] == ["small"]


def test_virtual_models_within_virtual_models():
    what = names(v={"awake": ["inner", "small"]}, inner={"ladder": ["big", "mid:low"]})
    found = what.resolve("v", Ask(), Seen(up=("mid",)))
    assert found.target == Target("mid", "mid:low")
    assert found.reason is Reason.AWAKE
    assert found.way == ("v", "inner", "mid:low")
    assert [target.name for target in what.targets("v")] == ["big", "mid:low", "small"]
    assert what.resolve("v", Ask(), Seen(up=("small",))).way == ("v", "small")


CHOICES = st.sampled_from(["awake", "first", "ladder", "split"])


@given(
    CHOICES,
    st.permutations([*MODELS, "mid:low"]),
    st.sets(st.sampled_from(MODELS)),
    st.sets(st.sampled_from(MODELS)),
    st.sampled_from([None, *(Target(name) for name in MODELS)]),
    st.floats(0, 1, exclude_max=True),
)
def test_what_is_chosen_is_a_target_and_is_not_refused_while_another_is_not(kind, order, up, full, kept, draw):
    up -= full
    virtual = {kind: dict.fromkeys(order, 1) if kind == "split" else list(order)}
    seen = Seen(up=tuple(up), waits=dict.fromkeys(full))
    found = names(v=virtual).resolve("v", Ask(kept=kept, draw=draw), seen)
    assert found.target in names(v=virtual).targets("v")
    assert found.way[0] == "v"
    assert found.way[-1] == found.target.name
    if kind != "split" and full != set(MODELS):
        assert found.target.model not in full
        assert kind == "first" or not up or found.target.model in up


@pytest.mark.parametrize(
    ("virtual", "seen", "expected", "others"),
    [
        ({"awake": ["big", FAR, "mid"]}, {}, (FAR, Reason.REMOTE), []),
        ({"awake": ["big", FAR, "mid"]}, {"up": ("big", "mid")}, ("big", Reason.AWAKE), []),
        ({"awake": ["big", FAR, "mid"]}, {"up": ("mid",), "leaves": False}, ("mid", Reason.AWAKE), []),
        ({"awake": ["big", FAR]}, {"coming": "big", "waits": {FAR: None}}, ("big", Reason.WAKING), []),
        ({"first": ["big", FAR]}, {}, ("big", Reason.FIRST), [FAR]),
        ({"first": ["big", FAR]}, {"leaves": False}, ("big", Reason.FIRST), []),
        ({"first": [FAR, "big"]}, {"leaves": False}, ("big", Reason.FIRST), []),
        ({"first": [FAR, "big"]}, {"waits": {FAR: None}}, ("big", Reason.FIRST), []),
        ({"first": [FAR]}, {"leaves": False}, (FAR, Reason.NONE_SERVES), []),
        ({"ladder": [FAR, "mid"]}, {"up": ("mid",)}, ("mid", Reason.AWAKE), []),
        ({"ladder": ["big", FAR]}, {"waits": {FAR: 2.0}}, (FAR, Reason.SHORTEST_WAIT), []),
        ({"ladder": ["big", FAR]}, {"waits": {FAR: 20.0}}, ("big", Reason.SHORTEST_WAIT), []),
        ({"ladder": [FAR, "big"]}, {"leaves": False}, ("big", Reason.SHORTEST_WAIT), []),
    ],
)
def test_a_model_on_another_host_among_others(virtual, seen, expected, others):
    seen = {"costs": {FAR: 0.0}} | seen
    found = names(v=virtual).resolve("v", Ask(), Seen(**seen))
    assert (found.target.name, found.reason) == expected
    assert [each.name for each in found.others] == others
    assert found.target.remote is (found.target.name == FAR)


def test_a_share_of_another_host_goes_to_the_others_where_a_request_may_not_leave():
    what = names(v={"split": {FAR: 50, "mid": 25, "big": 25}})
    for draw in (0.0, 0.4, 0.6, 0.9):
        here = what.resolve("v", Ask(draw=draw), Seen(leaves=False)).target.name
        assert here == ("mid" if draw in {0.0, 0.6} else "big")  # one half of what is theirs, and of the rest
    assert what.resolve("v", Ask(draw=0.4), Seen()).target.name == FAR


def test_a_conversation_stays_on_another_host_as_long_as_that_can_be_had():
    what, ask = names(v={"awake": ["big", FAR]}), Ask(kept=Target(FAR, remote=True))
    assert chosen(what, ask=ask, up=("big",)) == (FAR, Reason.CONVERSATION)
    assert chosen(what, ask=ask, up=("big",), leaves=False) == ("big", Reason.AWAKE)


SHARES = {"split": {"big": 60, "mid": 30, "small": 10}}


def test_a_share_that_may_not_be_had_goes_to_the_others_by_their_weights_and_these_keep_theirs():
    what = names(v=SHARES)
    draws = Counter()
    for n in range(1000):
        ask = Ask(draw=n / 1000)
        plain, limited = chosen(what, ask=ask), chosen(what, ask=ask, up=("big", "small"), only_up=True)
        draws[limited[0]] += plain[0] == "mid"
        assert limited == plain or plain[0] == "mid"
    assert draws["big"] == pytest.approx(300 * 6 / 7, abs=1)
    assert draws["small"] == pytest.approx(300 / 7, abs=1)


def test_a_key_whose_share_may_be_had_stays_with_it_whatever_becomes_of_the_others():
    what = names(v={**SHARES, "sticky": "key"})
    for n in range(300):
        ask = Ask(key=str(n))
        own, _ = chosen(what, ask=ask)
        for up in (("big",), ("mid",), ("big", "small"), ("mid", "small")):
            found, _ = chosen(what, ask=ask, up=up, only_up=True)
            assert found in up
            assert found == own or own not in up
            assert found == chosen(what, ask=ask, up=up, only_up=True)[0]


@pytest.mark.parametrize("kind", ["awake", "first", "ladder", "split"])
@pytest.mark.parametrize("outer", ["awake", "first", "ladder", "split"])
def test_only_targets_that_may_be_had_take_part(kind, outer):
    """The first of them is to blame if none of them can be had now; if there is none, the first of all."""

    def of(kind, *targets):
        return {kind: dict.fromkeys(targets, 1) if kind == "split" else list(targets)}

    what = names(v=of(outer, "inner", "small"), inner=of(kind, "big", "mid"))
    for draw in (0.0, 0.3, 0.6, 0.9):
        ask = Ask(draw=draw, kept=Target("big"))
        for waits in ({}, {"mid": None}):
            assert chosen(what, ask=ask, up=("mid",), waits=waits, only_up=True)[0] == "mid"
        assert chosen(what, ask=ask, up=("small",), only_up=True)[0] == "small"
        assert chosen(what, ask=ask, only_up=True)[0] in {"big", "mid", "small"}
    found = what.resolve("v", Ask(), Seen(up=("mid",), only_up=True))
    assert not found.others


def test_a_split_within_a_share_is_drawn_for_by_itself():
    what = names(v={"split": {"inner": 1, "big": 1}}, inner={"split": {"mid": 1, "small": 1}})
    draws = Counter(chosen(what, ask=Ask(draw=n / 1000))[0] for n in range(1000))
    assert draws == {"big": 500, "mid": 250, "small": 250}


@pytest.mark.parametrize("outer", ["awake", "ladder", "split"])
@pytest.mark.parametrize("kept", [None, Target("big")])
def test_a_first_within_another_has_its_next_targets(outer, kept):
    targets = {"safe": 1} if outer == "split" else ["safe"]
    what = names(
        v={outer: targets}, safe={"first": ["big", "middle", "small"]}, w={"first": ["v", "mid:low", "safe"]}
    )
    seen = Seen(up=("big",) if kept and outer != "split" else ())
    found = what.resolve("v", Ask(kept=kept), seen)
    assert (found.target.name, [each.name for each in found.others]) == ("big", ["mid", "small"])
    # Behind these come those of the outer one.
    found = what.resolve("w", Ask(kept=kept), seen)
    assert (found.target.name, [each.name for each in found.others]) == ("big", ["mid", "small", "mid:low"])


@pytest.mark.parametrize("kind", ["awake", "ladder", "split", "first"])
def test_what_a_first_names_itself_has_its_next_targets_though_a_later_one_leads_there_too(kind):
    inner = dict.fromkeys(("big", "mid"), 1) if kind == "split" else ["big", "mid"]
    what = names(v={"first": ["big", "small", "inner", FAR]}, inner={kind: inner})
    found = what.resolve("v", Ask(), Seen())
    assert (found.target.name, [each.name for each in found.others]) == ("big", ["small", FAR])


def test_a_first_within_another_fails_over_only_to_where_the_request_may_go():
    what = names(v={"split": {"safe": 1}}, safe={"first": ["big", "mid", FAR, "small"]})
    found = what.resolve("v", Ask(), Seen(up=("big", "small"), only_up=True))
    assert (found.target.name, [each.name for each in found.others]) == ("big", ["small"])


class Counted(Seen):
    """The same, counting how often a model is looked at."""

    looks = 0

    def awake(self, model):
        self.looks += 1
        return super().awake(model)

    def wait(self, model):
        self.looks += 1
        return super().wait(model)


@pytest.mark.parametrize("kind", ["awake", "first", "ladder"])
def test_a_lattice_of_virtual_models_is_not_walked_on_each_of_its_ways(kind):
    """Six levels of three, each of which chooses from all of the next: 729 ways lead down."""
    level, virtual = list(MODELS), {}
    for at in range(6):
        virtual |= {f"v{at}{place}": {kind: level} for place in range(3)}
        level = [f"v{at}{place}" for place in range(3)]
    what, seen = names(**virtual), Counted(waits=dict.fromkeys(MODELS))
    found = what.resolve("v50", Ask(), seen)
    assert (found.target.name, found.reason) == ("big", Reason.NONE_SERVES)
    assert seen.looks < 300
