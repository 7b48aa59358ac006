import pytest

from llmux.config.load import fill, interpolate

ENVIRON = {"P": "8001", "EMPTY": "", "DOLLAR": "${P}"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${P}", "8001"),
        ("http://h:${P}/x${P}", "http://h:8001/x8001"),
        ("${NO:-7}", "7"),
        ("${NO:-}", ""),
        ("${EMPTY:-7}", "7"),
        ("${EMPTY}", ""),
        ("${P:-7}", "8001"),
        ("${NO:-a:-b}", "a:-b"),
        ("$${P}", "${P}"),
        ("$$${P}", "$${P}"),
        ("$P $(x) $1 $", "$P $(x) $1 $"),
        ("${DOLLAR}", "${P}"),
    ],
)
def test_fill(text, filled):
    assert fill(text, ENVIRON) == filled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${NO}", r"NO is not set; set it, or write \$\{NO:-default\}"),
        ("${", "cannot read"),
        ("${}", "cannot read"),
        ("${a b}", "cannot read"),
        ("${P-7}", "cannot read"),
        ("${1}", "cannot read"),
        ("${P", "cannot read"),
        ("${NO:-${P}}", "cannot read"),
    ],
)
def test_what_cannot_be_filled(text, words):
    with pytest.raises(ValueError, match=words):
        fill(text, ENVIRON)


def test_values_everywhere_but_not_keys_scripts_or_anchors():
    data = {
        "x-y": {"z": "${NO}"},
        "models": {"${P}": {"wake": "${NO}", "port": "${P}", "env": {"wake": "${P}"}, "aliases": ["${P}"]}},
        "policy": {"options": {"a": ["${P}", 3, None]}},
    }
    filled, problems = interpolate(data, ENVIRON)
    assert not problems
    assert filled == {
        "x-y": {"z": "${NO}"},
        "models": {"${P}": {"wake": "${NO}", "port": "8001", "env": {"wake": "8001"}, "aliases": ["8001"]}},
        "policy": {"options": {"a": ["8001", 3, None]}},
    }


def test_a_file_with_variables(read, model):
    config = read(
        f"""
        port: ${{PORT}}
        policy: {{max_wait: "${{WAIT:-2m}}", drain_before_switch: "${{DRAIN:-false}}"}}
        capacity: ${{CAP:-24GiB}}
        models:
          a: {model('port: "${P}", memory: "${MEM:-1GiB}"')}
        """,
        environ={"PORT": "4000", "P": "8001"},
    )
    assert (config.port, config.models["a"].port, config.policy.max_wait) == (4000, 8001, 120.0)
    assert config.policy.drain_before_switch is False
    assert config.models["a"].memory == 2**30


def test_problems_name_the_place_once(refused, model):
    assert refused(f"port: ${{PORT}}\nhost: ${{\nmodels:\n  a: {model('port: x')}\n") == [
        "config.yaml:1: port: the variable PORT is not set; set it, or write ${PORT:-default}",
        "config.yaml:2: host: cannot read '${'; write ${NAME} or ${NAME:-default}, or $${ for a literal ${",
        "config.yaml:4: models.a.port: must be a whole number, not 'x'",
    ]
