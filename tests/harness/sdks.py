"""The clients of the SDKs for tests: over plain HTTP, and without retries.

A client made with the defaults reads all of Python's certificates, which is more work than most tests have.
"""

from __future__ import annotations

import ssl
from typing import Any

import anthropic
import openai

from tests.harness.waiting import PATIENCE

TRUSTS_NOTHING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def openai_client(url: str, **more: Any) -> openai.AsyncOpenAI:
    """Return a client of OpenAI's SDK for llmux at this URL. ``more``: what differs from the usual."""
    http = openai.DefaultAsyncHttpxClient(verify=TRUSTS_NOTHING)
    usual = {"api_key": "x", "max_retries": 0, "timeout": PATIENCE}
    return openai.AsyncOpenAI(base_url=f"{url}/v1", http_client=http, **usual | more)


def anthropic_client(url: str, **more: Any) -> anthropic.AsyncAnthropic:
    """Return a client of Anthropic's SDK for llmux at this URL. ``more``: what differs from the usual."""
    http = anthropic.DefaultAsyncHttpxClient(verify=TRUSTS_NOTHING)
    usual = {"api_key": "x", "max_retries": 0, "timeout": PATIENCE}
    return anthropic.AsyncAnthropic(base_url=url, http_client=http, **usual | more)
