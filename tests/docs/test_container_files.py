"""The Dockerfile and the compose file of the examples: what they name is there, and they agree."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml

from llmux.config import Config
from llmux.config.setting_types import parse_duration
from tests.docs.pages import ROOT

FOLDER = ROOT / "examples" / "docker"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]

TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
# What the compose file uses out of the Compose specification, and nothing else.
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "volumes", "ports", "restart"],
    "properties": {
        "build": {
            "type": "object",
            "additionalProperties": False,
            "required": ["context", "dockerfile", "target"],
            "properties": {"context": TEXT, "dockerfile": TEXT, "target": TEXT, "args": STRINGS},
        },
        "image": TEXT,
        "profiles": TEXTS,
        "ports": {
            "type": "array",
            "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"},
        },
        "environment": STRINGS,
        "volumes": TEXTS,
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": TEXT,
        "read_only": {"type": "boolean"},
        "tmpfs": TEXTS,
        "cap_drop": TEXTS,
        "security_opt": TEXTS,
        "ulimits": {"type": "object", "additionalProperties": {"type": "integer"}},
        "deploy": {"type": "object"},
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "services", "volumes"],
    "properties": {
        "name": TEXT,
        "services": {"type": "object", "additionalProperties": SERVICE},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
    },
}


def uncommented(text: str) -> str:
    """Take the commented settings in, as the comments say; comments in words stay."""
    return re.sub(r"^( *)# ( *)(?=(?:- )?[\w-]+:(?: |$))", r"\1\2", text, flags=re.MULTILINE)


class Step(NamedTuple):
    """One instruction of the Dockerfile."""

    stage: str
    word: str
    rest: str


def steps() -> Iterator[Step]:
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    stage = ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            if word == "FROM":
                stage = rest.rpartition(" AS ")[2]
            yield Step(stage, word, rest)


STEPS = list(steps())
IMAGES = ("llmux", "engine")


def of(stage: str, word: str) -> list[str]:
    return [step.rest for step in STEPS if (step.stage, step.word) == (stage, word)]


def test_the_compose_file_is_one_with_and_without_a_gpu():
    jsonschema.validate(COMPOSE, SCHEMA)
    with_gpu = yaml.safe_load(uncommented((FOLDER / "compose.yaml").read_text()))
    jsonschema.validate(with_gpu, SCHEMA)
    llmux = with_gpu["services"]["llmux"]
    assert llmux["build"]["args"]["ENGINE"].endswith("server-cuda")
    (device,) = llmux["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_configuration_is_one_with_a_gpu_too(tmp_path):
    text = uncommented((FOLDER / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(text)
    config = Config.from_file(tmp_path / "config.yaml")
    assert all(model.verify for model in config.models.values())


def test_what_the_services_mount_is_there():
    for name, service in SERVICES.items():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            assert target.startswith("/"), name
            if source in COMPOSE["volumes"]:
                continue
            assert mode == ["ro"], volume
            # The user's models are what is not in a clone.
            assert source == "./models" or (FOLDER / source).is_file(), volume


def test_the_configuration_and_the_services_agree():
    config, llmux = Config.from_file(FOLDER / "config.yaml"), SERVICES["llmux"]
    assert config.host == "0.0.0.0"
    assert llmux["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
    named = set(re.findall(r"\$\{(\w+)", (FOLDER / "config.yaml").read_text()))
    assert named == set(llmux["environment"])
    assert parse_duration(llmux["stop_grace_period"]) > config.shutdown_grace
    assert "./config.yaml:/etc/llmux/config.yaml:ro" in llmux["volumes"]
    (scrape,) = yaml.safe_load((ROOT / "examples/monitoring/prometheus.yaml").read_text())["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"llmux:{config.port}"]}]
    (source,) = yaml.safe_load((ROOT / "examples/monitoring/grafana/datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"][0].endswith(":9090")


def test_the_dashboards_are_where_grafana_looks():
    (provider,) = yaml.safe_load((ROOT / "examples/monitoring/grafana/provider.yaml").read_text())["providers"]
    targets = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert any(target.startswith(provider["options"]["path"] + "/") for target in targets)


def test_what_is_built_is_there():
    build = SERVICES["llmux"]["build"]
    context = (FOLDER / build["context"]).resolve()
    assert context == ROOT
    assert context / build["dockerfile"] == FOLDER / "Dockerfile"
    assert build["target"] in IMAGES
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for step in STEPS:
        if step.word == "COPY" and "--from=" not in step.rest:
            *sources, _target = [part for part in step.rest.split() if not part.startswith("--")]
            for source in sources:
                assert list(ROOT.glob(source)), source
                assert f"!{source.split('/')[0]}" in ignored, source


def test_stages_and_arguments_are_known():
    stages, given = [], set(re.findall(r"^(\w+)", "\n".join(of("", "ARG")), re.MULTILINE))
    for step in STEPS:
        if step.word == "FROM":
            base, _, stage = step.rest.partition(" AS ")
            assert set(re.findall(r"\$\{(\w+)\}", base)) <= given
            stages.append(stage)
        for source in re.findall(r"--from=(\w+)", step.rest):
            assert source in stages
    assert set(IMAGES) < set(stages)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_in_particular_and_says_how_it_is(image):
    config = Config.from_file(FOLDER / "config.yaml")
    words = [step.word for step in STEPS if step.stage == image]
    assert of(image, "USER") == ["10001"]  # a number: Kubernetes cannot tell that a name is not root's
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))
    assert "--uid 10001" in " ".join(of(image, "RUN"))
    assert "chgrp -R 0 /var/lib/llmux && chmod -R g=u /var/lib/llmux" in " ".join(
        " ".join(of(image, "RUN")).split()
    )
    (check,) = of(image, "HEALTHCHECK")
    assert f"http://127.0.0.1:{config.port}/health" in check
    assert of(image, "EXPOSE") == [str(config.port)]
    assert of(image, "ENTRYPOINT") == ['["llmux"]']
    assert of(image, "CMD") == ['["-c", "/etc/llmux/config.yaml"]']
    (state,) = of(image, "VOLUME")
    assert f"state:{state}" in SERVICES["llmux"]["volumes"]
    assert state == f"{dict(part.split('=', 1) for part in of(image, 'ENV')[0].split())['XDG_STATE_HOME']}/llmux"


def test_extras_and_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\.whl\)\[([\w,]+)\]", " ".join(step.rest for step in STEPS)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    needed = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    versions = re.findall(r"PYTHON(?:_VERSION)?=(?:python:)?(\d+\.\d+)", (FOLDER / "Dockerfile").read_text())
    assert len(versions) == 2
    assert all(tuple(map(int, version.split("."))) >= needed for version in versions)


def test_the_hooks_of_the_configuration_are_in_the_image():
    config = Config.from_file(FOLDER / "config.yaml")
    (source, target) = of("engine", "COPY")[-1].split()[1:]
    for model in config.models.values():
        for script in model.scripts.values():
            path, _, name = script.split()[0].rpartition("/")
            assert f"{path}/" == target
            assert fnmatch.fnmatch(f"hooks/{name}", source)
            assert (ROOT / "hooks" / name).is_file()
    for stage in ("llmux", "engine"):
        assert f"hooks/lib {target}lib/" in of(stage, "COPY")


def test_the_models_can_be_chosen_from_outside(monkeypatch):
    monkeypatch.setenv("MODEL_ONE", "mine.gguf")
    assert Config.from_file(FOLDER / "config.yaml").models["one"].env["MODEL"] == "/models/mine.gguf"
