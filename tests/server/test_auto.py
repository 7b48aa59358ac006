"""``use: auto`` in a llmux that serves: a process beside it looks back, and whatever it does, serving goes on."""

import json
import math
import os
import random
import sys
from pathlib import Path
from unittest import mock

import pytest

from llmux.errors import PolicyLoadError
from llmux.runtime.policy_chooser import MOST, SHARE, Chooser, Exchange, LookError, Traffic, checked
from tests.server.house import until

SOON = {"among": ["adaptive", "idle", "fifo"], "every": 0.05, "past": 0.05}
LATER = {"among": ["fifo", "idle"], "every": "5m"}


def auto(**options):
    return {"use": "auto", "options": options}


def says(**changes):
    """Return a command that answers what a look back might."""
    scores = [{"name": name, "value": value, "sure": 0.99} for name, value in (("adaptive", 5.0), ("idle", 2.0))]
    scores.append({"name": "fifo", "value": 9.0, "sure": 0.0})
    said = {"name": "idle", "before": "adaptive", "reason": "it waits less", "requests": 90, "scores": scores}
    return ["printf", "%s", json.dumps({**said, **changes})]


async def opened(house, command, options=SOON):
    """Open it with another command than the look back, from the first look on."""
    follow = Chooser.follow

    def with_the_command(chooser):
        chooser.command = command
        follow(chooser)

    with mock.patch.object(Chooser, "follow", with_the_command):
        return await house.open(policy=auto(**options))


def half_an_hour(now, seconds=3.0):
    """Return what came in half an hour, for two models never asked for long: leaving a busy one costs much."""
    dice = random.Random(1)
    time, made = now - 1750.0, []
    while (time := time + dice.expovariate(0.3)) < now - 1.0:
        served = dice.expovariate(1.0 / seconds)
        size = int(100 * served)
        made.append(Exchange(time, dice.choice("ab"), 1.0, served, 1.0 + served / 2, 50, size, "answered"))
    return made


async def test_what_was_better_is_adopted_with_its_reason(house):
    switcher = await opened(house, says())
    await until(lambda: switcher.core.state.policy.chosen == "idle")
    (told,) = house.log.named("policy_adopted")
    assert told == {"policy": "idle", "before": "adaptive", "reason": "it waits less"}
    status = (await house.ask("GET", "/llmux/status")).json()["policy"]
    assert status["use"] == "auto"
    assert status["auto"]["chosen"] == "idle"
    assert status["auto"]["looks"]["adopted"] == 1
    decided = (await house.ask("GET", "/llmux/decisions")).json()["decisions"][-1]
    assert (decided["kind"], decided["by"], decided["target"]) == ("adopt", "auto", None)
    assert decided["reason"] == "idle decides from now on, in place of adaptive: it waits less"
    metrics = (await house.ask("GET", "/metrics")).body.decode()
    assert 'llmux_policy_choice{policy="idle"} 1.0' in metrics
    assert 'llmux_policy_choice{policy="adaptive"} 0.0' in metrics
    assert 'llmux_policy_looks_total{result="adopted"} 1.0' in metrics
    assert "llmux_policy_look_cpu_seconds_total" in metrics


async def test_what_is_not_better_is_not(house):
    switcher = await opened(house, says(name="adaptive"))
    await until(lambda: switcher.auto.counts["kept"] >= 2)
    assert switcher.core.state.policy.chosen == "adaptive"
    assert not house.log.named("policy_adopted")
    assert switcher.auto.document()["last"]["reason"] == "it waits less"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sh", "-c", "echo no memory; exit 3"], "the process ended with 3: no memory"),
        (["sh", "-c", "kill -9 $$"], "the process ended with -9"),
        (["/nowhere/python"], "No such file or directory: '/nowhere/python'"),
        (["true"], "the answer is not JSON: b''"),
        (["echo", "sorry"], "the answer is not JSON"),
        (["sh", "-c", "yes | head -c 100000"], "the answer is longer than 65536 bytes"),
        (says(name="best"), "names 'best', which is not a candidate"),
        (says(name="fifo"), "would adopt fifo, which its own figures do not call better"),
        (says(before="fifo"), "is about 'fifo', but 'adaptive' decides"),
    ],
)
async def test_a_process_that_fails_or_lies_changes_nothing(house, command, said):
    switcher = await opened(house, command)
    await until(lambda: switcher.auto.counts["failed"] >= 2)
    assert switcher.core.state.policy.chosen == "adaptive"
    assert said in switcher.auto.error
    assert said in house.log.named("policy_look_failed")[0]["error"]
    assert (await house.chat("a")).status == 200
    assert not house.log.named("policy_adopted")
    assert said in (await house.ask("GET", "/llmux/status")).json()["policy"]["auto"]["error"]


async def test_a_process_that_hangs_is_ended_with_all_that_it_began(house, tmp_path):
    hang = f"sleep 600 & echo $! $$ > {tmp_path}/pids; wait"
    switcher = await opened(house, ["sh", "-c", hang])
    await until(lambda: (tmp_path / "pids").is_file() and len((tmp_path / "pids").read_text().split()) == 2)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    switcher.auto.limit = 0.1
    await until(lambda: switcher.auto.counts["failed"])
    assert switcher.auto.error == "the process took longer than 0.1 s"
    switcher.auto.command = ["true"]
    await until(lambda: not any(map(alive, pids)))
    assert switcher.core.state.policy.chosen == "adaptive"
    assert (await house.chat("b")).status == 200


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_stop_ends_the_process(house, tmp_path):
    switcher = await opened(house, ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"])
    await until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().strip())
    await switcher.auto.close()
    pid = int((tmp_path / "pid").read_text())
    assert not alive(pid)
    assert switcher.auto.document() is None


async def test_a_real_look_back_finds_what_is_better(house):
    switcher = await house.open(policy=auto(**LATER))
    costs = switcher.core.state.costs
    for source, target in ("ab", "ba"):
        costs.record([source], target, 8.0)
    switcher.auto.traffic.requests.extend(half_an_hour(switcher.now()))
    await switcher.auto.look(switcher.core.state.policy)
    assert switcher.core.state.policy.chosen == "idle"
    last = switcher.auto.last
    values = {score["name"]: score["value"] for score in last["scores"]}
    assert values["idle"] < 0.9 * values["fifo"]
    assert last["requests"] == len(switcher.auto.traffic.requests) > 450
    assert switcher.auto.cpu > 0.0
    assert f"on the last {last['requests']} requests idle has a mean wait of" in last["reason"]
    # What it has found is kept for the next look, which adds to it.
    first = switcher.auto.memory
    await switcher.auto.look(switcher.core.state.policy)
    assert {row[0] for row in first["seen"].values()} == {1.0}
    assert max(row[0] for row in switcher.auto.memory["seen"].values()) == 2.0


async def test_a_policy_of_ones_own_that_hangs_there_changes_nothing(house, monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)  # it is found there whatever the locale
    slow = "import sys, time\nclass Mine:\n    def decide(self, now):\n"
    slow += "        while 'look_back' in sys.argv[0]: time.sleep(600)\n"
    (house.folder / "größe.py").write_text(slow)
    switcher = await house.open(policy=auto(among=["fifo", "./größe.py:Mine"], every="5m"))
    switcher.core.state.costs.record(["a"], "b", 8.0)
    switcher.auto.traffic.requests.extend(half_an_hour(switcher.now()))
    switcher.auto.limit = 3.0
    with pytest.raises(LookError, match="took longer than 3 s"):
        await switcher.auto.look(switcher.core.state.policy)
    assert switcher.core.state.policy.chosen == "fifo"


async def test_without_evidence_nothing_is_said(house):
    switcher = await house.open(policy=auto(**LATER))
    await house.chat("a")
    await switcher.auto.look(switcher.core.state.policy)
    assert switcher.auto.last is None
    assert switcher.core.state.policy.chosen == "fifo"


async def test_requests_are_remembered_without_what_is_in_them(house):
    switcher = await house.open(policy=auto(**LATER))
    await house.chat("a")
    async with switcher.hold("b"):
        pass
    one, guard = switcher.auto.traffic.requests
    assert (one.model, one.outcome, guard.outcome) == ("a", "answered", "held")
    assert one.waited >= 0.0
    assert one.served >= 0.0
    assert one.sent > 0
    assert one.got > 0
    assert set(one.line(0.0)) == {
        "model", "arrival_s", "wait_s", "service_s", "first_byte_s", "prompt_bytes", "answer_bytes", "outcome",
    }  # fmt: skip


async def test_beside_a_record_both_are_told(house):
    switcher = await house.open(policy=auto(**LATER), record="record.jsonl")
    await house.chat("a")
    assert len(switcher.auto.traffic.requests) == 1
    assert (house.folder / "record.jsonl").is_file()


async def test_other_policies_remember_nothing(house):
    switcher = await house.open()
    await house.chat("a")
    assert switcher.auto.traffic is None
    assert "auto" not in (await house.ask("GET", "/llmux/status")).json()["policy"]
    assert "llmux_policy_choice{" not in (await house.ask("GET", "/metrics")).body.decode()


async def test_a_reload_begins_and_ends_it(house):
    switcher = await house.open()
    switcher.replace(house.config(policy=auto(**LATER)))
    assert switcher.auto.document()["chosen"] == "fifo"
    policy = switcher.core.state.policy
    switcher.replace(house.config(policy={**auto(**LATER), "max_wait": "1m"}))
    assert switcher.core.state.policy is policy
    switcher.replace(house.config())
    assert switcher.auto.document() is None
    await house.chat("a")


async def test_a_candidate_of_ones_own_is_read_anew(house):
    (house.folder / "mine.py").write_text("class Mine:\n    def decide(self, now):\n        return 1\n")
    switcher = await house.open(policy=auto(among=["fifo", "./mine.py:Mine"]))
    before = switcher.core.state.policy
    switcher.replace(house.config(policy=auto(among=["fifo", "./mine.py:Mine"])))
    assert switcher.core.state.policy is not before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"among": []}, "policy.options.among"),
        ({"among": ["idel"]}, "policy.options.among: idel: no such policy; did you mean idle?"),
        ({"among": ["fifo", "auto"]}, "policy.options.among: auto: it chooses among policies itself"),
        ({"among": ["adaptive:patience=-1"]}, "policy.options.among: patience: input should be greater than 0"),
        (
            {"objective": "median"},
            "policy.options.objective: 'median' is unknown; write mean, p95, p99, or slo:10s",
        ),
        ({"objective": "slo:soon"}, "'soon' is not a duration"),
        ({"every": "often"}, "policy.options.every: 'often' is not a duration"),
        ({"every": 0}, "policy.options.every: "),
        ({"amongst": []}, "policy.options.amongst: unknown option; did you mean `among`?"),
    ],
)
async def test_slips(house, options, said):
    with pytest.raises(PolicyLoadError) as caught:
        await house.open(policy=auto(**options))
    assert said in str(caught.value)


# ---- the parts


def test_traffic_is_bounded_by_time_and_number():
    traffic = Traffic(100.0)
    for time in range(300):
        traffic.add(Exchange(float(time), "a", 0.0, 1.0, 0.5, 1, 1, "answered"), float(time))
    assert [traffic.requests[0].arrived, len(traffic.requests)] == [199.0, 101]
    for _ in range(MOST + 10):
        traffic.add(Exchange(300.0, "a", 0.0, 1.0, 0.5, 1, 1, "answered"), 300.0)
    assert len(traffic.requests) == MOST


async def test_what_costs_much_is_done_seldom(house):
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"]
    switcher = await opened(house, busy)
    await until(lambda: switcher.auto.counts["failed"])  # it answers nothing
    await until(lambda: switcher.auto.due is not None)
    assert switcher.auto.document()["next_in"] > 0.15 / SHARE - 1.0 > 1.0
    assert switcher.auto.cpu >= 0.2


GOOD = {
    "name": "b", "before": "a", "reason": "be\tcause", "requests": 5,
    "scores": [{"name": "a", "value": 2, "sure": 0.0}, {"name": "b", "value": 1.0, "sure": 0.95}],
}  # fmt: skip


def test_an_answer_that_can_be_believed():
    assert checked(GOOD, ["a", "b"], "a")["reason"] == "be cause"
    assert checked({**GOOD, "name": "a"}, ["a", "b"], "a")["name"] == "a"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "is not an object"),
        (None, "is not an object"),
        ({**GOOD, "name": ["b"]}, "is not a candidate"),
        ({**GOOD, "reason": 5}, "gives no reason"),
        ({**GOOD, "requests": True}, "gives no reason"),
        ({**GOOD, "scores": None}, "lacks the score"),
        ({**GOOD, "scores": [5, *GOOD["scores"]]}, "a score of what is not a candidate"),
        ({**GOOD, "scores": GOOD["scores"][:1]}, "lacks the score"),
        (
            {**GOOD, "scores": [GOOD["scores"][0], {"name": "b", "value": math.nan, "sure": 1.0}]},
            "is not a number",
        ),
        ({**GOOD, "scores": [GOOD["scores"][0], {"name": "b", "value": -1.0, "sure": 1.0}]}, "is not a number"),
        ({**GOOD, "scores": [GOOD["scores"][0], {"name": "b", "value": "1", "sure": 1.0}]}, "is not a number"),
        ({**GOOD, "scores": [GOOD["scores"][0], {"name": "b", "value": 1.0, "sure": 0.2}]}, "do not call better"),
    ],
)
def test_answers_that_cannot(answer, said):
    with pytest.raises(LookError) as caught:
        checked(answer, ["a", "b"], "a")
    assert said in str(caught.value)


def test_the_process_runs_at_the_lowest_priority():
    assert os.nice(0) < 19
    assert Chooser.__module__ == "llmux.runtime.policy_chooser"
