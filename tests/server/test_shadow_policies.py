"""``policy: {shadow: […]}``: other policies' answers, counted while one is followed."""

import pytest

from llmux.config import Config
from llmux.errors import ConfigError, PolicyLoadError
from llmux.runtime.shadow import LONG, PATIENCE, TOO_LONG, SlowShadowError, Timed
from tests.server.house import until

ILL = "class Ill:\n    def decide(self, now):\n        raise RuntimeError('ill')\n"


async def metrics(house):
    text = (await house.ask("GET", "/metrics")).body.decode()
    lines = [line.split(" ") for line in text.splitlines() if line.startswith("llmux_shadow_decisions_total{")]
    return {labels: float(count) for labels, count in lines}


async def test_what_others_would_have_done_is_counted(house):
    (house.folder / "ill.py").write_text(ILL)
    wanted = ["fifo", {"use": "timeslice", "options": {"min_active": 9}}, "./ill.py:Ill", "fifo"]
    await house.open(policy={"use": "idle", "shadow": wanted})
    await house.chat("a")
    async with house.switcher.hold("a"):
        waiting = await house.begin("POST", "/v1/x", {"model": "b"})
        await until(lambda: house.queued("b"))
        found = await metrics(house)
    # At first nothing is awake: both wake a. Then idle stays with the busy model, and fifo would go.
    name = "llmux_shadow_decisions_total"
    assert found[f'{name}{{agrees="true",decision="switch",policy="fifo#1"}}'] == 1
    assert found[f'{name}{{agrees="false",decision="switch",policy="fifo#1"}}'] == 1
    assert not [labels for labels in found if "ill" in labels]
    assert (await waiting.reply()).status == 200
    status = (await house.ask("GET", "/llmux/status")).json()["shadows"]
    assert [each["policy"] for each in status] == ["fifo#1", "timeslice", "./ill.py:Ill", "fifo#2"]
    assert status[2]["dropped"] == "RuntimeError: ill"
    assert status[0]["asked"] > status[0]["agreed"] > 0
    assert [line["policy"] for line in house.log.named("shadow_dropped")] == ["./ill.py:Ill"]


async def test_reloads_keep_what_was_counted(house):
    switcher = await house.open(policy={"shadow": ["idle"]})
    await house.chat("a")
    (before,) = switcher.shadows
    assert before.counts
    switcher.replace(house.config(policy={"shadow": ["idle", "amortized"], "max_wait": "1m"}))
    kept, new = switcher.shadows
    assert kept is before
    assert not new.counts
    switcher.replace(house.config(policy={"shadow": [{"use": "amortized", "options": {"alpha": 9}}]}))
    (changed,) = switcher.shadows
    assert changed is not new
    switcher.replace(house.config())
    assert switcher.shadows == ()
    assert await metrics(house) == {}


@pytest.mark.parametrize(
    ("shadow", "message"),
    [
        (["idel"], "policy.shadow[0].use: idel: no such policy; did you mean idle?"),
        (
            ["idle", {"use": "idle", "options": {"x": 1}}],
            "policy.shadow[1].options.x: idle takes no options; remove it",
        ),
    ],
)
async def test_a_shadow_that_does_not_load(house, shadow, message):
    with pytest.raises(PolicyLoadError) as caught:
        await house.open(policy={"shadow": shadow})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shadow", "where"),
    [
        ("idle", "policy.shadow"),
        ([7], "policy.shadow[0]: must be the name of a policy, or {use: NAME, options: {…}}, not 7"),
        ([{"uses": "idle"}], "policy.shadow[0]: has no setting 'uses'; it takes `use` and `options`"),
        ([""], "policy.shadow[0]"),
    ],
)
def test_a_shadow_that_is_none(house, shadow, where):
    with pytest.raises(ConfigError) as caught:
        house.config(policy={"shadow": shadow})
    assert where in str(caught.value)


def test_a_shadow_that_is_slow():
    class Policy:
        def decide(self, _now):
            return clock.pop(0)

    def timed(*seconds):
        moments = iter([moment for each in seconds for moment in (0.0, each)])
        return Timed(Policy(), clock=lambda: next(moments))

    clock = [None] * 100
    quick = timed(*[LONG / 2] * 50)
    for _ in range(50):
        quick.decide(None)
    with pytest.raises(SlowShadowError, match="an answer took 60 ms"):
        timed(TOO_LONG + 0.01).decide(None)
    slow = timed(*[LONG * 2] * 50)
    for _ in range(PATIENCE):
        slow.decide(None)
    with pytest.raises(SlowShadowError):
        slow.decide(None)


def test_none_cost_nothing(house):
    assert Config.model_validate({"models": {"a": house.model()}}).policy.shadow == ()
