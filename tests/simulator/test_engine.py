import pytest

from llmux.simulator import EngineModel, Job

JOB = Job(0.0, "a", prompt_tokens=600, output_tokens=30)


def test_a_prompt_counts_in_the_currency_of_decoding():
    assert EngineModel().work(JOB) == 36.0
    assert EngineModel().before_first_token(JOB) == 7.0


def test_an_answer_has_a_token_at_least():
    assert EngineModel().work(Job(0.0, "a", 0, 0)) == 1.0


def test_streams_slow_each_other_down():
    rates = EngineModel(slots=3, decode=60.0, slowdown=0.5).rates()
    assert rates == [0.0, 60.0, 40.0, 30.0]


def test_load():
    engine = EngineModel(slots=2, decode=10.0, slowdown=0.0)
    assert engine.load([Job(0.0, "a", 0, 100)] * 2, 20.0) == pytest.approx(0.5)
    assert engine.load([], 0.0) == 0.0
