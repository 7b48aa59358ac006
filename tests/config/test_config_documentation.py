import json
import re
from pathlib import Path

import pytest
import yaml

from llmux.config import Config
from llmux.config.problems import sections
from llmux.config.reference import json_schema, settings, settings_table

try:
    import jsonschema
except ModuleNotFoundError:
    jsonschema = None

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    file
    for folder in ("examples", "hooks")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in {".yaml", ".yml", ".json"}
    and re.search(r'^models:|"models":', file.read_text(), re.MULTILINE)
)
MODEL = {"port": 8001, "wake": "w", "sleep": "s", "alive": "a"}

SCHEMA = json_schema()

needs_jsonschema = pytest.mark.skipif(jsonschema is None, reason="jsonschema is not installed")


def test_every_setting_has_a_row_with_a_description():
    rows = list(settings())
    assert all(row.description.endswith(".") and row.type and row.default for row in rows)
    assert len({row.path for row in rows}) == len(rows)
    documented = {row.path for row in rows}
    for place, section in sections(Config):
        for name in section.model_fields:
            path = ".".join([*map(str, place), name])
            assert path in documented or any(row.startswith(f"{path}.") for row in documented), path


def test_the_table():
    table = settings_table().splitlines()
    assert table[0] == "| setting | type | default | what it does |"
    rows = dict(re.findall(r"^\| `(.*?)` \| .*? \| `(.*?)` \|", "\n".join(table), re.MULTILINE))
    assert rows["port"] == "3000"
    assert rows["policy.max_wait"] == "10m"
    assert rows["max_body"] == "256MiB"
    assert rows["models.NAME.timeouts.wake"] == "30m"
    assert rows["models.NAME.wake"] == "required"
    assert rows["policy.drain_before_switch"] == "true"
    assert rows["forward"] == "[default]"


def test_the_schema_is_json_and_describes_every_setting():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].endswith("2020-12/schema")
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        assert all("description" in setting for setting in section["properties"].values())


@needs_jsonschema
def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@needs_jsonschema
@pytest.mark.parametrize(
    ("settings", "valid"),
    [
        ({}, True),
        ({"port": "${P}", "policy": {"max_wait": "1h30m", "min_active_secs": 3}, "x-a": [1]}, True),
        ({"policy": {"max_wait": "${W:-3}", "drain_before_switch": "${D}"}, "capacity": "24GiB"}, True),
        ({"policy": {"request_timeout_secs": None}, "max_body": 3, "log_level": "${L}"}, True),
        ({"models": {"a": MODEL | {"env": {"A": 1, "B": True, "C": "x"}}}}, True),
        ({"prot": 1}, False),
        ({"port": 70000}, False),
        ({"port": "3000"}, False),
        ({"policy": {"max_wait": "soon"}}, False),
        ({"capacity": "18G"}, False),
        ({"log_level": "warn"}, False),
        ({"models": {"a": MODEL | {"url": "http://x"}}}, False),
        ({"models": {"a": {"wake": "w", "sleep": "s", "alive": "a"}}}, False),
        ({"models": {"a": MODEL | {"wake": True}}}, False),
    ],
)
def test_what_the_schema_accepts(settings, valid):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid({"models": {"a": MODEL}} | settings) is valid


@needs_jsonschema
@pytest.mark.parametrize("file", EXAMPLES, ids=str)
def test_the_examples_fit_the_schema(file):
    jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("file", EXAMPLES, ids=str)
def test_the_examples_load(file):
    assert Config.from_file(file).models
