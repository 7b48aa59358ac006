"""What counts as a sign that a model is there, beside its ``alive`` hook."""

from __future__ import annotations

from tests.server.house import House

ERROR = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 19\r\n\r\nmodel is not loaded"


async def test_an_error_is_no_sign_that_the_model_is_there(house: House):
    switcher = await house.open("a")
    assert (await house.chat("a")).status == 200
    activity = switcher.activities["a"][1]
    assert activity.last_byte is not None
    activity.last_byte = None
    house.engine.says = ERROR
    assert (await house.chat("a")).status == 400
    assert activity.last_byte is None
    house.engine.says = None
    assert (await house.chat("a")).status == 200
    assert activity.last_byte is not None


async def test_a_model_that_is_gone_is_noticed_though_the_server_before_it_answers_with_errors(house: House):
    await house.open("a", alive_every="50ms", alive_failures=2)
    assert (await house.chat("a")).status == 200
    house.engine.says = ERROR
    (house.folder / "a.up").unlink()
    while not house.log.named("model_lost"):
        assert (await house.chat("a")).status == 400
    house.engine.says = None
    assert (await house.chat("a")).status == 200
