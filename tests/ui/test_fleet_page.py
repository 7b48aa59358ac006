"""The page of a gateway, in a real browser, before real hosts."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import NamedTuple

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from tests.harness.lease.fleet import Door
from tests.harness.lease.raw import HOST

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


class Place(NamedTuple):
    """Where a page is."""

    url: str


@pytest.fixture
def door(tmp_path):
    found = Door(tmp_path)
    for name in ("one", "two"):
        found.add(name)
    found.write_gateway()
    found.start()
    yield found
    found.finish()


def chat(door, model):
    connection = http.client.HTTPConnection(HOST, door.port, timeout=60)
    body = json.dumps({"model": model, "messages": []})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200
    return answer.headers["X-LLMux-Host"]


def test_hosts_are_rows_with_what_they_hold_and_can_be_drained(door, visit):
    page = visit(Place(f"http://{HOST}:{door.port}"))
    expect(page.locator("body")).to_have_attribute("data-link", "live")
    expect(page.locator("#hosts tbody tr")).to_have_count(2)
    expect(page.locator("#facts")).to_contain_text("2 of 2 hosts ready · route least_wait")
    name = chat(door, "a")
    other = {"one": "two", "two": "one"}[name]
    row = page.locator(f"#hosts tr[data-host={name}]")
    expect(row).to_contain_text("a")
    expect(row.locator("td").nth(6)).to_have_text("1")  # it has woken
    expect(page.locator("#models tr[data-model=a]")).to_contain_text(name)
    page.evaluate(AXE)
    found = page.evaluate("axe.run().then(found => found.violations.map(it => it.id))")
    assert found == []

    page.get_by_role("button", name=f"Drain {name}").click()
    page.get_by_role("button", name="Drain", exact=True).click()
    expect(row).to_have_attribute("data-state", "leased")
    assert chat(door, "a") == other
    page.get_by_role("button", name=f"Undrain {name}").click()
    expect(row).to_have_attribute("data-state", "ready")

    door.hosts[other].kill()
    lost = page.locator(f"#hosts tr[data-host={other}]")
    expect(lost).to_have_attribute("data-state", "unreachable")
    expect(lost).to_contain_text("connection refused")
    expect(page.locator("#facts")).to_contain_text("1 of 2 hosts ready")
