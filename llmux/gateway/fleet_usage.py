"""What each key used, over all hosts: their ledgers' sums, put together.

Hosts are told whose each request is, and know what it took of their GPUs. So a gateway keeps no ledger: it asks,
and adds up, by host as well where that is wanted.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from llmux.accounts import usage
from llmux.errors import BadRequestError, EngineError

if TYPE_CHECKING:
    from llmux.gateway.hosts import Host, Hosts

HOST = "host"  # what only a gateway can split by
_OK = 200


async def read(hosts: Hosts, given: Mapping[str, str]) -> dict[str, Any]:
    """Answer a question as a host does, with ``missing``: the hosts that did not, and why.

    Raises BadRequestError.
    """
    by = [part.strip() for part in given.get("by", "key,model").split(",") if part.strip()]
    theirs = ",".join(part for part in by if part != HOST)
    try:
        question = usage.asked({**given, "by": theirs}, time.time())
    except ValueError as error:
        param, why = error.args
        raise BadRequestError(f'"{param}": {why}', param=param) from None
    if question.top is not None:
        raise BadRequestError('"top" can be asked of a host only', param="top")
    query = urlencode({**given, "by": theirs})
    names = list(dict.fromkeys(by))
    answers = await asyncio.gather(*(_ask(host, hosts, query) for host in hosts.all()))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    missing, lost = {}, 0
    for host, answer in zip(hosts.all(), answers, strict=True):
        if isinstance(answer, str):
            missing[host.name] = answer
            continue
        lost += int(answer.get("lost") or 0)
        for row in answer["usage"]:
            _add(rows, names, {**row, HOST: host.name} if HOST in names else row)
    found = [rows[place] for place in sorted(rows, key=str)]
    return {
        "by": names,
        "since": question.since,
        "usage": found,
        "total": usage.totals(found),
        "lost": lost,
        "missing": missing,
    }


async def _ask(host: Host, hosts: Hosts, query: str) -> dict[str, Any] | str:
    """Return a host's answer, or why there is none."""
    try:
        answer = await hosts.ask(host, "GET", f"/llmux/usage?{query}")
        document = json.loads(answer.body)
        if answer.status == _OK and isinstance(document["usage"], list):
            return dict(document)
        return str(document["error"]["message"])
    except EngineError as error:
        return error.message
    except (ValueError, LookupError, TypeError):
        return "it does not answer as a llmux does"


def _add(rows: dict[tuple[Any, ...], dict[str, Any]], names: list[str], row: Mapping[str, Any]) -> None:
    """Add a row to that of the same place."""
    place = tuple(row.get(name) for name in (*names, "currency"))
    one = rows.get(place)
    if one is None:
        # In the order of the question, as a host's.
        figures = {name: value for name, value in row.items() if name not in names}
        rows[place] = {name: row.get(name) for name in names} | figures
        return
    for name, value in row.items():
        if name not in names and isinstance(value, int | float) and not isinstance(value, bool):
            one[name] += value
