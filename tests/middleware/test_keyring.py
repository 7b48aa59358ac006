"""Whose key it is: known ones at once, unknown ones by Argon2id, and a flood of wrong ones costs little."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from argon2 import PasswordHasher

from llmux.config import Config
from llmux.config.access import check_hash, fits, hash_of, new_key
from llmux.errors import TooManyAttemptsError, UnauthorizedError
from llmux.middleware import authentication
from llmux.middleware.authentication import BURST, PENDING, Holder, Keyring, Turns, network_of
from tests.harness.waiting import PATIENCE
from tests.server.house import until

MODEL = {"port": 9, "wake": "true", "sleep": "true", "alive": "true"}
KEYS = {name: new_key() for name in ("one", "two", "root", "other")}
HASHES = {name: PasswordHasher(1, 8, 1).hash(key) for name, key in KEYS.items()}  # of little work


def config(*api, **more) -> Config:
    return Config(models={"m": MODEL}, api_keys=api, **more)


def named(name: str) -> dict[str, str]:
    return {"name": name, "key": HASHES[name]}


def key(name: str) -> bytes:
    return KEYS[name].encode()


class Checker:
    """Counts the checks, and holds them up while it is told to."""

    def __init__(self) -> None:
        self.checks = 0
        self.at_once = self.most = 0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, key: bytes, text: str) -> bool:
        self.checks += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.go.wait(PATIENCE)
        self.at_once -= 1
        return fits(key, text)


@pytest.fixture
def checker():
    checker = Checker()
    yield checker
    checker.go.set()


def ring(checker, *api, **more) -> Keyring:
    made = Keyring(check=checker)
    made.configure(config(*api, **more))
    return made


def test_made_keys_differ_and_their_hashes_fit_only_them():
    assert len(set(KEYS.values())) == len(KEYS)
    assert all(made.startswith("sk-llmux-") and len(made) == 52 for made in KEYS.values())
    for name, hashed in HASHES.items():
        check_hash(hashed)
        assert [other for other in KEYS if fits(key(other), hashed)] == [name]
    one, another = hash_of("k"), hash_of("k")
    check_hash(one)
    assert one != another
    assert fits(b"k", one)
    assert not fits(b"l", one)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("argon2id", "argon2i"), "another kind"),
        (lambda text: text.replace("v=19", "v=16"), "another kind"),
        (lambda text: text[: text.index(",")], "not a whole hash"),
        (lambda text: text[: text.rindex("$") + 5], "not a whole hash"),
        (lambda text: text + "!", "not a whole hash"),
        (lambda text: text.replace("m=8,", "m=99999999,"), "takes more than"),
        (lambda text: text.replace("m=8,", "m=7,"), "or less than"),
        (lambda text: text.replace("t=1,", "t=0,"), "or less than"),
        (lambda text: text.replace("t=1,", "t=1000,"), "takes more than"),
        (lambda text: text.replace("m=8,t=1,p=1", "m=19456,t=2,p=64"), "takes more than"),
    ],
)
def test_a_hash_that_cannot_be_used_is_refused_without_repeating_it(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        check_hash(change(HASHES["one"]))
    assert HASHES["one"].split("$")[-2] not in str(caught.value)


async def test_a_key_is_recognized_from_its_first_showing_on(checker):
    keys = ring(checker, named("one"), named("two"))
    assert keys.recognize(key("two")) is None
    assert (await keys.ask([key("two")], "1.2.3.4")).name == "two"
    assert checker.checks == 2
    assert keys.recognize(key("two")).name == "two"
    assert keys.recognize(key("one")) is None
    assert await keys.ask([key("other")], "1.2.3.4") is None
    assert checker.checks == 3  # the hash whose key is known cannot be another's
    assert keys.recognize(key("other")) is None


async def test_a_key_in_plain_text_needs_no_check(checker):
    keys = ring(checker, "plain", admin_key="root")
    assert keys.recognize(b"plain") == Holder(None, operator=False)
    assert keys.recognize(b"root") == Holder("admin_key", operator=True)
    assert keys.recognize(b"plai") is None
    assert await keys.ask([b"plai"], "") is None
    assert checker.checks == 0


async def test_an_operators_key_opens_everything_whatever_else_it_is(checker):
    keys = ring(checker, named("one"), HASHES["root"], admin_key=HASHES["root"])
    assert (await keys.ask([key("root")], "")).operator
    assert not (await keys.ask([key("one")], "")).operator
    assert ring(checker, "both", admin_key="both").recognize(b"both").operator


async def test_a_reload_forgets_what_is_gone_and_keeps_what_stays(checker):
    keys = ring(checker, named("one"), named("two"))
    for name in ("one", "two"):
        assert await keys.ask([key(name)], "")
    keys.configure(config({"name": "renamed", "key": HASHES["two"]}))
    assert keys.recognize(key("one")) is None
    assert await keys.ask([key("one")], "") is None
    assert keys.recognize(key("two")).name == "renamed"
    assert keys.wanted
    keys.configure(config())
    assert (keys.wanted, keys.guarded, keys.any) == (False, False, False)
    assert keys.recognize(key("two")) is None


async def test_a_reload_during_a_check_counts(checker):
    keys = ring(checker, named("one"))
    checker.go.clear()
    asking = asyncio.create_task(keys.ask([key("one")], ""))
    await until(lambda: checker.at_once)
    keys.configure(config(named("two")))
    checker.go.set()
    assert await asking is None
    assert keys.recognize(key("one")) is None


async def test_who_shows_the_same_key_at_once_waits_for_one_check(checker):
    keys = ring(checker, named("one"))
    found = await asyncio.gather(*(keys.ask([key("one")], "1.2.3.4") for _ in range(4 * BURST)))
    assert {holder.name for holder in found} == {"one"}
    assert checker.checks == 1


async def test_the_first_to_ask_may_leave(checker):
    keys = ring(checker, named("one"))
    checker.go.clear()
    first, second = (asyncio.create_task(keys.ask([key("one")], "")) for _ in range(2))
    await until(lambda: checker.at_once)
    first.cancel()
    checker.go.set()
    assert (await second).name == "one"
    assert checker.checks == 1


async def test_wrong_keys_of_one_address_are_limited_and_known_ones_do_not_notice(checker):
    keys = ring(checker, named("one"), named("two"))
    assert await keys.ask([key("one")], "1.2.3.4")
    keys._check = lambda _key, _text: False
    for attempt in range(BURST):
        assert await keys.ask([b"wrong %d" % attempt], "1.2.3.4") is None
    with pytest.raises(TooManyAttemptsError) as caught:
        await keys.ask([b"one more"], "1.2.3.4")
    assert 0 < caught.value.retry_after <= 3
    assert keys.recognize(key("one")).name == "one"
    keys._check = fits
    assert (await keys.ask([key("two")], "1.2.3.5")).name == "two"


async def test_right_keys_are_not_counted():
    owners = {text: name for name, text in HASHES.items()}
    keys = ring(lambda shown, text: shown == key(owners[text]), *map(named, KEYS))
    for _ in range(BURST):
        for name in KEYS:
            assert await keys.ask([b"engine's own", key(name)], "1.2.3.4")
        keys.configure(config())
        keys.configure(config(*map(named, KEYS)))
    assert keys._attempts._left["1.2.3.4"][0] == BURST


async def test_one_is_checked_at_a_time_and_few_wait(checker):
    keys = ring(checker, named("one"))
    checker.go.clear()
    asking = [asyncio.create_task(keys.ask([b"wrong %d" % n], f"10.0.0.{n}")) for n in range(PENDING)]
    await until(lambda: checker.at_once)
    with pytest.raises(TooManyAttemptsError):
        await keys.ask([key("one")], "10.0.1.1")
    for task in asking[1:]:
        task.cancel()
    checker.go.set()
    await asking[0]
    assert checker.most == 1
    for task in list(keys._pending.values()):
        task.cancel()


async def test_wrong_keys_take_a_quarter_of_a_core(checker):
    keys = ring(checker, named("one"))
    busy = 0.0

    def slow(_key, _text):
        nonlocal busy
        began = time.perf_counter()
        time.sleep(0.005)
        busy += time.perf_counter() - began
        return False

    keys._check = slow
    began = time.perf_counter()
    await asyncio.gather(*(keys.ask([b"wrong %d" % n], f"10.0.0.{n}") for n in range(10)))
    assert busy / (time.perf_counter() - began) < 0.35  # the pause after the last one is not in it


async def test_a_wrong_key_is_checked_once_until_a_reload(checker):
    keys = ring(checker, named("one"), named("two"))
    for _ in range(2 * BURST):
        assert await keys.ask([key("other")], "1.2.3.4") is None
    assert checker.checks == 2
    assert isinstance(keys.refusal([key("other")], "1.2.3.4"), UnauthorizedError)
    assert keys.refusal([b"new"], "1.2.3.4") is None
    keys.configure(config(named("one"), named("other")))
    assert keys.refusal([key("other")], "1.2.3.4") is None
    assert (await keys.ask([key("other")], "1.2.3.4")).name == "other"


async def test_a_reload_during_a_check_leaves_no_wrong_key_behind(checker):
    keys = ring(checker, named("one"))
    checker.go.clear()
    asking = asyncio.create_task(keys.ask([key("two")], ""))
    await until(lambda: checker.at_once)
    keys.configure(config("".join(KEYS["two"])))
    keys.configure(config(named("one"), named("two")))
    checker.go.set()
    assert (await asking).name == "two"


async def test_few_wrong_keys_are_remembered(monkeypatch):
    monkeypatch.setattr(authentication, "WRONG", 3)
    keys = ring(lambda *_: False, named("one"))
    for n in range(5):
        assert await keys.ask([b"%d" % n], f"10.0.0.{n}") is None
    assert [keys.refusal([b"%d" % n], "10.0.1.1") is None for n in range(5)] == [True, True, False, False, False]


async def test_what_is_refused_at_once_is_what_would_have_been_refused(checker):
    keys = ring(checker, named("one"))
    assert isinstance(keys.refusal([], "1.2.3.4"), UnauthorizedError)
    assert isinstance(keys.refusal([b"", b"x" * 513], "1.2.3.4"), UnauthorizedError)
    checker.go.clear()
    asking = [asyncio.create_task(keys.ask([b"wrong %d" % n], "1.2.3.4")) for n in range(BURST)]
    await until(lambda: len(keys._pending) == BURST)
    assert isinstance(keys.refusal([b"new"], "1.2.3.4"), TooManyAttemptsError)
    assert keys.refusal([b"wrong 3"], "1.2.3.4") is None  # its answer is under way
    assert keys.refusal([b"new"], "1.2.3.5") is None
    for task in asking:
        task.cancel()
    for task in list(keys._pending.values()):
        task.cancel()
    checker.go.set()


@pytest.mark.parametrize("flooders", [1, 3])
async def test_a_new_key_waits_for_few_checks_during_a_flood_from_other_addresses(monkeypatch, flooders):
    monkeypatch.setattr(authentication, "PAUSE", 0.0)
    checked: list[bytes] = []
    go = threading.Event()

    def check(shown: bytes, _text: str) -> bool:
        go.wait(PATIENCE)
        checked.append(shown)
        return shown == b"right"

    keys = ring(check, named("one"))
    flood = [
        asyncio.create_task(keys.ask([b"wrong %d" % n], f"10.0.0.{n % flooders}")) for n in range(BURST * flooders)
    ]
    await until(lambda: len(keys._pending) == BURST * flooders)
    right = asyncio.create_task(keys.ask([b"right"], "10.0.1.1"))
    await until(lambda: len(keys._pending) == BURST * flooders + 1)
    go.set()
    assert (await right).name == "one"
    assert checked.index(b"right") <= 2 * flooders
    await asyncio.gather(*flood)


async def test_when_many_wait_the_address_with_the_most_gives_way(monkeypatch):
    monkeypatch.setattr(authentication, "PENDING", 4)
    monkeypatch.setattr(authentication, "PAUSE", 0.0)
    go = threading.Event()
    keys = ring(lambda shown, _text: bool(go.wait(PATIENCE)) and shown == b"right", named("one"))
    flood = [asyncio.create_task(keys.ask([b"wrong %d" % n], "10.0.0.1")) for n in range(4)]
    await until(lambda: len(keys._pending) == 4)
    with pytest.raises(TooManyAttemptsError):
        await keys.ask([b"wrong 5"], "10.0.0.1")
    right = asyncio.create_task(keys.ask([b"right"], "10.0.1.1"))
    with pytest.raises(TooManyAttemptsError):
        await flood[3]
    go.set()
    assert (await right).name == "one"
    assert await asyncio.gather(*flood[:3]) == [None] * 3


async def test_a_turn_whose_key_is_no_longer_wanted_goes_to_the_next():
    turns = Turns()
    await turns.wait("a")
    waiting = [asyncio.create_task(turns.wait(address)) for address in ("a", "b", "b", "c")]
    await asyncio.sleep(0)
    waiting[1].cancel()
    turns.end()
    waiting[0].cancel()  # it has been given the turn, and has not run yet
    await waiting[3]  # c's
    assert not waiting[2].done()
    turns.end()
    await waiting[2]
    turns.end()
    await turns.wait("d")


async def test_what_can_be_no_key_is_not_checked(checker):
    keys = ring(checker, named("one"))
    assert await keys.ask([b"", b"x" * 513], "") is None
    assert checker.checks == 0


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_addresses_that_one_may_choose_among_count_as_one(host, network):
    assert network_of(host) == network
