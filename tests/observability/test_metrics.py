from __future__ import annotations

import timeit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmux.core import effects as core
from llmux.core.spec import HookKind
from llmux.observability.metrics import HELP, PAIRS, GaugeRow, Metrics

ORIGINAL = {
    "llmux_switch_total": {"from", "to", "result"},
    "llmux_switch_duration_seconds": {"from", "to"},
    "llmux_switch_drain_duration_seconds": {"from", "to"},
    "llmux_model_active_duration_seconds": {"model"},
    "llmux_switch_cost_ema_seconds": {"from", "to"},
    "llmux_request_queue_depth": {"model"},
    "llmux_request_queue_wait_seconds": {"model"},
    "llmux_model_in_flight": {"model"},
    "llmux_requests_total": {"model", "status"},
    "llmux_request_duration_seconds": {"model", "status"},
    "llmux_hook_duration_seconds": {"model", "hook"},
    "llmux_hook_failures_total": {"model", "hook"},
}


def scrape(metrics):
    """{sample name: {sorted label values: value}}."""
    samples = {}
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


def value(samples, name, **labels):
    labels = {key.rstrip("_"): text for key, text in labels.items()}
    return samples[name][frozenset(labels.items())]


@pytest.fixture
def metrics():
    metrics = Metrics(
        lambda: [GaugeRow("a", 3, 2, "awake"), GaugeRow("b", 0, 0, "asleep")], models=["a", "b"], process=False
    )
    metrics.request_ended("a", 200, 0.0, 0.25)
    metrics.request_ended("a", 200, 5.0, 31.0)
    metrics.request_ended("a", 504, 1800.0, None)
    metrics.hook_ended("a", "wake", 2.0, ok=False)
    metrics.effect(core.SwitchDrained(1, ("a",), "b", 0.2))
    metrics.effect(core.SwitchEnded(1, ("a",), "b", "success", 3.0, 0.2, 2.8, 2.9))
    metrics.effect(core.SwitchEnded(2, (), "a", "success", 3.0, 0.0, 3.0, 4.0))
    metrics.effect(core.SwitchEnded(3, ("a", "b"), None, "failure", 3.0, 0.0, None, None))
    metrics.effect(core.ModelDeactivated("a", 100.0))
    return metrics


def test_the_originals_names_and_labels(metrics):
    samples = scrape(metrics)
    for name, labels in ORIGINAL.items():
        series = next(samples[key] for key in (name, f"{name}_count") if key in samples)
        for keys in series:
            assert {label for label, _ in keys} == labels
    assert not [name for name in samples if name.endswith("_created")]
    assert {name.removesuffix("_count") for name in samples if not name.endswith(("_bucket", "_sum"))} <= set(HELP)


def test_every_metric_has_a_help_text(metrics):
    text = metrics.render()[0].decode()
    elsewhere = {name for name in HELP if name.startswith(("llmux_audit_", "llmux_captures_"))}
    for name in HELP.keys() - elsewhere:
        assert f"# HELP {name} {HELP[name]}" in text


def test_values(metrics):
    samples = scrape(metrics)
    assert value(samples, "llmux_requests_total", model="a", status="200") == 2
    assert value(samples, "llmux_requests_total", model="a", status="504") == 1
    assert value(samples, "llmux_request_duration_seconds_sum", model="a", status="200") == 31.25
    assert value(samples, "llmux_request_duration_seconds_count", model="a", status="504") == 0
    assert value(samples, "llmux_request_duration_seconds_bucket", model="a", status="200", le="0.25") == 1
    assert value(samples, "llmux_request_duration_seconds_bucket", model="a", status="200", le="0.1") == 0
    assert value(samples, "llmux_request_queue_wait_seconds_bucket", model="a", le="1800.0") == 3
    assert value(samples, "llmux_request_queue_wait_seconds_bucket", model="a", le="+Inf") == 3
    assert value(samples, "llmux_switch_total", from_="idle", to="a", result="success") == 1
    assert value(samples, "llmux_switch_total", from_="several", to="none", result="failure") == 1
    assert value(samples, "llmux_switch_duration_seconds_count", from_="a", to="b") == 1
    assert value(samples, "llmux_switch_drain_duration_seconds_sum", from_="a", to="b") == 0.2
    assert value(samples, "llmux_switch_cost_ema_seconds", from_="idle", to="a") == 4.0
    assert value(samples, "llmux_model_active_duration_seconds_sum", model="a") == 100.0
    assert value(samples, "llmux_hook_duration_seconds_count", model="a", hook="wake") == 1
    assert value(samples, "llmux_hook_failures_total", model="a", hook="wake") == 1
    assert value(samples, "llmux_request_queue_depth", model="a") == 3
    assert value(samples, "llmux_model_in_flight", model="a") == 2
    assert value(samples, "llmux_model_phase", model="a", phase="awake") == 1
    assert value(samples, "llmux_model_phase", model="b", phase="awake") == 0


def test_the_extra_ones(metrics):
    metrics.effect(core.Reject(1, "a", core.Refusal.QUEUE_FULL, "", None, 0.0))
    metrics.request_rejected(None, "bad_request")
    metrics.effect(core.CancelRequests((1, 2), "a", core.CutReason.STOPPING))
    metrics.effect(core.ModelLost("a", "x"))
    metrics.effect(core.BackoffStarted("a", HookKind.WAKE, 1, 1.0, "x"))
    metrics.effect(core.PolicyOverruled("x"))
    metrics.effect(core.Stopped())
    metrics.cost_estimated(("b",), "a", 9.0)
    samples = scrape(metrics)
    assert value(samples, "llmux_requests_rejected_total", model="a", code="queue_full") == 1
    assert value(samples, "llmux_requests_rejected_total", model="unknown", code="bad_request") == 1
    assert value(samples, "llmux_requests_cut_total", model="a", reason="stopping") == 2
    assert value(samples, "llmux_model_lost_total", model="a") == 1
    assert value(samples, "llmux_model_backoffs_total", model="a", hook="wake") == 1
    assert value(samples, "llmux_policy_overruled_total") == 1
    assert value(samples, "llmux_switch_cost_ema_seconds", from_="b", to="a") == 9.0


def test_a_model_may_be_called_as_a_label():
    metrics = Metrics(models=["other", "a"], process=False)
    metrics.effect(core.SwitchEnded(1, ("other",), "a", "success", 1.0, 0.0, 1.0, 4.0))
    assert value(scrape(metrics), "llmux_switch_cost_ema_seconds", from_="other", to="a") == 4.0


def test_what_clients_invent_is_no_label(metrics):
    before = len(metrics.render()[0].splitlines())
    for number in range(1000):
        metrics.request_ended(f"invented-{number}", 404, 0.0, 0.001)
        metrics.request_rejected(f"invented-{number}", "model_not_found")
        metrics.request_ended("a", 1000 + number, 0.0, 0.001)
        metrics.hook_ended(f"invented-{number}", "wake", 1.0, ok=True)
        metrics.effect(core.SwitchEnded(1, (f"i{number}",), f"j{number}", "success", 1.0, 0.0, 1.0, 1.0))
    samples = scrape(metrics)
    assert len(metrics.render()[0].splitlines()) < before + 200
    assert value(samples, "llmux_requests_total", model="unknown", status="404") == 1000
    assert value(samples, "llmux_requests_total", model="a", status="other") == 1000


def test_a_removed_model_leaves_nothing(metrics):
    metrics.effect(core.ModelRemoved("a"))
    metrics.request_ended("a", 200, 0.0, 0.1)  # a late one
    text = metrics.render()[0].decode()
    kept = [line for line in text.splitlines() if '="a"' in line]
    gauges = ("queue_depth", "in_flight", "phase", "pinned")
    assert all(any(name in line for name in gauges) for line in kept)
    metrics.declare(["a"])
    metrics.request_ended("a", 200, 0.0, 0.1)
    assert value(scrape(metrics), "llmux_requests_total", model="a", status="200") == 1


def test_names_are_escaped():
    name = 'a"b\\c\nd/é'
    metrics = Metrics(models=[name], process=False)
    metrics.request_ended(name, 200, 0.0, 0.1)
    assert value(scrape(metrics), "llmux_requests_total", model=name, status="200") == 1


def test_several_apps_in_one_process():
    one, other = Metrics(models=["a"]), Metrics(models=["a"])
    one.request_ended("a", 200, 0.0, 0.1)
    assert b"process_" in one.render()[0]
    assert "llmux_requests_total" in scrape(one)
    assert "llmux_requests_total" not in scrape(other)


def test_counting_is_quick(metrics):
    took = min(timeit.repeat(lambda: metrics.request_ended("a", 200, 0.0, 0.3), number=1000, repeat=5)) / 1000
    assert took < 30e-6  # under 1 µs on an idle machine


async def test_the_text_that_a_thread_writes_is_the_same():
    metrics = Metrics(lambda: [GaugeRow("a", 3, 1, "awake", pinned=True)], models=["a"], process=False)
    metrics.request_ended("a", 200, 0.3, 0.1, 1e7, (123, 2_000_000))
    assert await metrics.text() == metrics.render()[0]


def test_of_many_models_only_some_pairs_have_series_of_their_own():
    names = [f"m{number}" for number in range(60)]
    metrics = Metrics(models=names)
    for source in names:
        for target in names:
            metrics.effect(core.SwitchDrained(1, (source,), target, 0.5))
            metrics.effect(core.SwitchEnded(1, (source,), target, "success", 1.0, 0.0, 1.0, 1.0))
    samples = scrape(metrics)
    switches = samples["llmux_switch_total"]
    assert sum(switches.values()) == 3600
    assert len(switches) <= PAIRS + 60
    assert value(samples, "llmux_switch_total", from_="m0", to="m1", result="success") == 1
    assert value(samples, "llmux_switch_total", from_="other", to="m1", result="success") > 40
    assert len(samples["llmux_switch_cost_ema_seconds"]) == PAIRS
    for name in names[1:]:
        metrics.effect(core.ModelRemoved(name))
    metrics.declare(["new"])
    metrics.effect(core.SwitchEnded(1, ("m0",), "new", "success", 1.0, 0.0, 1.0, 1.0))
    assert value(scrape(metrics), "llmux_switch_total", from_="m0", to="new", result="success") == 1
