"""What is shown on a narrow terminal: whole names and phases, on few columns."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from llmux.cli.terminal import Column, Exit, FittingTable
from tests.cli.invoking import answered, llmux, said
from tests.server.house import held, until

LONG = "qwen3-coder-30b-a3b-instruct"


def drawn(width, columns, rows, remarks=(), short=()):
    console = Console(width=width, record=True, file=io.StringIO())
    cells = [[Text(cell) for cell in row] for row in rows]
    console.print(FittingTable(columns, cells, remarks, [Text(cell) for cell in short]))
    return console.export_text()


COLUMNS = (Column("model"), Column("phase"), Column("second", drop=2), Column("first", drop=1))


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [(60, ("second", "first"), ()), (40, ("second",), ("first",)), (30, (), ("second", "first"))],
)
def test_columns_are_left_out_before_a_word_is_broken(width, there, gone):
    text = drawn(width, COLUMNS, [("a-model-name", "in flight", "12", "34567")])
    assert "a-model-name" in text
    assert "in flight" in text
    assert all(title in text for title in there)
    assert not any(title in text for title in gone)
    assert max(map(len, text.splitlines())) <= width


def test_remarks_stand_beside_the_others_or_below():
    rows, remarks = [("a", "awake", "", ""), ("b", "asleep", "", "")], ["pinned: a demo", ""]
    wide, narrow = drawn(100, COLUMNS, rows, remarks), drawn(50, COLUMNS, rows, remarks)
    assert "remarks" in wide
    assert "remarks" not in narrow
    assert narrow.splitlines()[-1] == "a: pinned: a demo"


@pytest.mark.parametrize(("width", "long"), [(60, True), (45, False)])
def test_first_cells_are_shortened_before_a_column_is_left_out(width, long):
    rows = [("model (an alias)", "asleep", "12", "34567"), ("other", "awake", "", "")]
    text = drawn(width, COLUMNS, rows, ["a remark", ""], ["model", "other"])
    assert ("an alias" in text) == long
    assert "34567" in text
    assert "\nmodel" in text or long


def test_a_name_that_is_wider_than_the_terminal_is_broken_not_cut():
    text = drawn(24, COLUMNS, [("n" * 50, "awake", "", "")])
    assert text.count("n") >= 50


async def test_80_columns(house):
    await house.open(models={LONG: {"aliases": ["coder"]}, "b": {"wake": held("b")}})
    assert (await house.chat(LONG)).status == 200
    waiting = await house.begin("POST", "/v1/chat/completions", {"model": "b"})
    await until(lambda: house.switcher.core.state.models["b"].queue)
    for words in (("status",), ("top", "--once", "--every", "0.2"), ("requests",), ("explain",)):
        done = await llmux(house, *words, COLUMNS="80")
        assert done.exit_code == 0, done.output
        lines = done.output.splitlines()
        assert max(map(len, lines)) <= 80, done.output
        if words[0] != "explain":
            assert LONG in done.output, done.output
    narrow, wide = [(await llmux(house, "status", COLUMNS=width)).output for width in ("76", "120")]
    assert f"{LONG} (coder)" in wide
    assert "coder)" not in narrow  # before a column goes
    assert all(LONG in text and "expected" in text for text in (narrow, wide))
    waiting.abort()
    house.release("b")


async def test_the_last_requests(house):
    await house.open(models={"a": {"aliases": ["alias"]}, "b": {"wake": "exit 1"}})
    assert await said(house, "requests") == "no request has ended yet"
    house.engine.says = (
        b'HTTP/1.1 200 OK\r\nContent-Length: 54\r\n\r\n{"usage": {"prompt_tokens": 12,"completion_tokens": 3}}'
    )
    await house.ask("POST", "/v1/chat/completions", {"model": "a"}, X_Request_ID="one-1")
    await house.ask("POST", "/v1/chat/completions", {"model": "b"}, X_Request_ID="two-2")
    text = await said(house, "requests")
    assert text.index("one-1") < text.index("two-2")  # the newest is the last
    assert "12 → 3" in text
    assert "503 wake_failed" in text
    assert "two-2" not in await said(house, "requests", "alias")
    assert "one-1" not in await said(house, "requests", "-n", "1")
    assert [one["request_id"] for one in (await answered(house, "requests"))["requests"]] == ["two-2", "one-1"]
    await said(house, "requests", "nothing", exit_code=Exit.NO_SUCH_MODEL)


async def test_which_key_suffices(house):
    await house.open(api_keys=["user"], admin_key="root")
    assert "an API key suffices, in LLMUX_API_KEY" in await said(house, "status", exit_code=Exit.NOT_ALLOWED)
    assert "admin key in LLMUX_ADMIN_KEY" in await said(
        house, "wake", "a", exit_code=Exit.NOT_ALLOWED, LLMUX_API_KEY="user"
    )
    assert "an API key suffices" in await said(house, "explain", exit_code=1)


async def test_explain_says_what_live_switches_cost(house):
    await house.open(models={"a": {}, "b": {"wake": "echo no; exit 1"}})
    await house.chat("a")
    await house.chat("b")
    await until(lambda: house.switcher.core.state.switch is None)
    first, second = (await answered(house, "explain"))["switches"]
    assert (first["result"], first["error"]) == ("success", None)
    assert first["cost"] > 0
    assert (second["result"], second["cost"]) == ("failure", None)
    assert "exited with 1" in second["error"]
    text = await said(house, "explain")
    assert "(assumed, not measured yet)" in text
    assert "failure: " in text


async def test_unpinning_says_so(house):
    await house.open()
    await said(house, "pin", "a")
    assert await said(house, "unpin", "a") == "unpinned a"
