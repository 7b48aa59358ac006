import pytest

from llmux.core.spec import ModelSpec, Rules
from llmux.simulator import CostMatrix, EngineModel, Job, Trace, TraceError, simulate
from llmux.simulator.engine_model import Engines, parse_engines
from llmux.simulator.run import Scene
from tests.policies.views import policy

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


USUAL = EngineModel()


def test_each_model_may_have_its_own_engine():
    engines = parse_engines(["a:slots=2,decode=40", "b/c:1:slowdown=0.5", "a:slots=3"], USUAL, ["a", "b/c:1", "d"])
    assert engines.of("a") == EngineModel(slots=3, decode=40.0)
    assert engines.of("b/c:1") == EngineModel(slowdown=0.5)
    assert engines.of("d") == USUAL


def test_engines_from_a_file(tmp_path):
    path = tmp_path / "engines.yaml"
    path.write_text("a: {slots: 4, decode: 20}\nb: {speed: 2}\n")
    engines = parse_engines([str(path)], USUAL, ["a", "b"])
    assert engines.of("a") == EngineModel(slots=4, decode=20.0)
    assert engines.of("b").rate(1) == 120.0


def test_what_a_record_shows_stays_where_nothing_else_is_said():
    fitted = {"a": EngineModel(2, 1.0, 1e9, 0.9)}
    assert parse_engines(["a:speed=2"], USUAL, ["a"], fitted).of("a") == EngineModel(2, 1.0, 1e9, 0.9, 2.0)
    with pytest.raises(TraceError, match="for decode, write speed=2"):
        parse_engines(["a:decode=40"], USUAL, ["a"], fitted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "write MODEL:KEY=NUMBER"),
        (":slots=1", "write MODEL:KEY=NUMBER"),
        ("a:", "says nothing of the engine"),
        ("a:slots", "slots must be a whole number > 0, not ''"),
        ("a:slots=1.5", "slots must be a whole number > 0, not '1.5'"),
        ("a:slots=0", "slots must be a whole number > 0"),
        ("a:decode=0", "decode must be a number > 0"),
        ("a:slowdown=-1", "slowdown must be a number ≥ 0"),
        ("a:slowdown=nan", "slowdown must be a number ≥ 0"),
        ("a:decode=inf", "decode must be a number > 0"),
        ("a:speed=fast", "speed must be a number > 0, not 'fast'"),
        ("a:tokens=3", "'tokens' is unknown; use slots, decode"),
        ("b:slots=3", "the traffic has no model 'b', only a"),
        ("missing.yaml", "No such file"),
    ],
)
def test_what_is_no_engine(text, message):
    with pytest.raises(TraceError, match=message):
        parse_engines([text], USUAL, ["a"])


@pytest.mark.parametrize("text", ["[1]", "a: 3", "a: [", "a: {slots: true}"])
def test_what_is_no_file_of_engines(tmp_path, text):
    path = tmp_path / "engines.yaml"
    path.write_text(text)
    with pytest.raises(TraceError, match=r"engines\.yaml"):
        parse_engines([str(path)], USUAL, ["a"])


def test_the_engine_itself_keeps_what_has_no_slot():
    """A model without max_in_flight is given everything at once."""
    engine = EngineModel(slots=1, decode=1.0, prefill=1e9, slowdown=0.0)
    scene = Scene([ModelSpec("a", max_in_flight=None)], frozenset("a"))
    jobs = [Job(0.0, "a", 0, 4), Job(1.0, "a", 0, 2), Job(1.5, "a", 0, 1)]
    outcome = simulate(Trace("t", jobs), policy("fifo"), CostMatrix(0.0), engine=engine, scene=scene)
    assert outcome.admitted == [0.0, 1.0, 1.5]
    assert outcome.finished == [4.0, 6.0, 7.0]
    assert outcome.first_token == [1.0, 5.0, 7.0]


def test_engines_of_different_speed_beside_each_other():
    engines = Engines(own={"a": EngineModel(2, 1.0, 1e9, 0.0), "b": EngineModel(2, 4.0, 1e9, 0.0)})
    jobs = [Job(0.0, "a", 0, 8), Job(0.0, "b", 0, 8)]
    together = Rules(capacity=2)
    scene = Scene([ModelSpec("a", memory=1), ModelSpec("b", memory=1)], frozenset("ab"))
    outcome = simulate(
        Trace("t", jobs), policy("fifo"), CostMatrix(0.0), engine=engines, rules=together, scene=scene
    )
    assert outcome.finished == [8.0, 2.0]
