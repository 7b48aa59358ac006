"""Which requests take the fast path is decided when a configuration is loaded, by key and model."""

import pytest

from llmux.config import Config
from llmux.middleware.classes import Classes
from llmux.middleware.model_handler import COUNT

MODEL = {"wake": "w", "sleep": "s", "alive": "a", "shared_address": True, "port": 8001}
MODELS = {
    "small": MODEL | {"aliases": ["mini"]},
    "big": MODEL,
    "slow": MODEL | {"deadline": "10s"},
    "narrow": MODEL | {"apis": ["messages"], "variants": {"narrow:v": {}}},
    "ruled": MODEL | {"variants": {"ruled:v": {}}},
    "many": MODEL | {"variants": {"many:v": {"set": {"n": 1}}}},
}
KEYS = [
    {"name": "free", "key": "k1"},
    {"name": "held", "key": "k2", "models": ["small"]},
    {"name": "limited", "key": "k3", "models": ["small"], "limits": {"requests": "9/m"}},
    {"name": "budgeted", "key": "k4", "budget": {"usd": 5}},
    {"name": "captured", "key": "k5"},
    {"name": "rider", "key": "k6", "class": "ride_along"},
]
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


@pytest.fixture
def classes(tmp_path):
    def make(**more):
        config = Config(
            models=MODELS,
            api_keys=KEYS,
            virtual={
                "any": {"first": ["small", "big"]},
                "late": {"awake": ["any", "slow"]},
                "ruled-any": {"awake": ["small"]},
                "odd": {"awake": ["any", "narrow:v"]},
            },
            routes=[{"when": {"model": ["ruled*"]}, "to": "small"}],
            captures={"keys": ["captured"], "folder": str(tmp_path)},
            **more,
        )
        return Classes(config)

    return make


@pytest.mark.parametrize(
    ("key", "name", "path", "managed"),
    [
        (None, "small", CHAT, False),
        (None, "mini", CHAT, False),
        (None, "slow", CHAT, False),
        (None, "narrow", CHAT, True),  # and this be translated
        (None, "narrow", MESSAGES, False),
        (None, "any", CHAT, False),
        (None, "late", CHAT, False),
        (None, "odd", CHAT, True),
        (None, "odd", MESSAGES, False),
        (None, "many:v", CHAT, False),
        (None, "narrow:v", CHAT, True),
        (None, "narrow:v", MESSAGES, False),
        (None, "many:v", COUNT, True),
        (None, "any", COUNT, True),
        (None, "ruled", CHAT, True),
        (None, "ruled-any", CHAT, True),
        (None, "ruled:v", CHAT, True),
        ("held", "any", CHAT, True),
        ("limited", "many:v", CHAT, True),
        (None, "small", COUNT, True),
        ("free", "small", CHAT, False),
        ("rider", "big", CHAT, False),  # whose model is awake
        ("held", "small", CHAT, False),
        ("held", "mini", CHAT, False),
        ("held", "big", CHAT, True),  # 403
        ("held", "narrow", MESSAGES, True),
        ("held", "small", COUNT, True),
        ("limited", "small", CHAT, False),
        ("limited", "big", CHAT, True),
        ("budgeted", "big", CHAT, False),
        ("captured", "small", CHAT, True),
        ("captured", "narrow", MESSAGES, True),
    ],
)
def test_the_class_of_a_request(classes, key, name, path, managed):
    metered = classes(ledger="ledger.db", prices={"gpu_hour": 1})
    assert metered.of(key, name, path) == ("managed" if managed else "metered")


def test_without_a_ledger_it_is_plain():
    config = Config(models=MODELS, api_keys=KEYS[:2])
    assert Classes(config).of("held", "small") == "plain"
    assert Classes(config).of("held", "big") == "managed"


async def test_a_key_that_is_held_to_models_takes_the_fast_path(house, monkeypatch):
    ways = []
    house.up("small")
    models = {"small": {"aliases": ["mini"]}, "big": {}}
    keys = [{"name": "held", "key": "k2", "models": ["small"]}, {"name": "free", "key": "k1"}]
    await house.open(models, api_keys=keys)
    assert (await house.ask("POST", CHAT, {"model": "small"}, Authorization="Bearer k1")).status == 200
    match = house.front.fast_path.match

    def noted(*given):
        found = match(*given)
        ways.append(found is not None)
        return found

    monkeypatch.setattr(house.front.fast_path, "match", noted)
    for key, name, status in (("k2", "small", 200), ("k2", "mini", 200), ("k2", "big", 403), ("k1", "small", 200)):
        reply = await house.ask("POST", CHAT, {"model": name}, X_Request_ID=name, Authorization=f"Bearer {key}")
        assert reply.status == status
    assert ways == [True, True, False, True]


def test_keys_of_a_role_share_their_classes():
    models = {f"m{n}": {"port": 9000 + n, "wake": ":", "sleep": ":", "alive": ":"} for n in range(3)}
    keys = [{"name": name, "key": f"sk-{name}-0123456789", "role": "some"} for name in ("alice", "bob")]
    given = {"models": models, "roles": {"some": {"models": ["m1", "m2"]}}, "api_keys": keys}
    classes = Classes(Config.model_validate(given))
    path = "/v1/chat/completions"
    assert classes.names("alice", path) is classes.names("bob", path)
    assert set(classes.names("bob", path)) == {"m1", "m2"}
