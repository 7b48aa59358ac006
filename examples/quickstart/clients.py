"""The demo's load: what a few programs with the official SDKs would send, and what came back."""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import anthropic
import openai

WORDS = ("wake", "sleep", "drain", "token", "model", "queue", "memory", "the", "of", "and", "switch", "engine")


@dataclass(frozen=True)
class Answer:
    """One request that was answered: the engine that had to, the one that did, and the figures."""

    expected: str
    model: str
    waited: float  # seconds in llmux's queue, as its header says
    tokens: int
    seconds: float = 0.0  # from its sending to the last piece, where that was measured


@dataclass
class Ledger:
    """Everything that was sent, and how it ended."""

    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    open: int = 0

    @property
    def misrouted(self) -> list[Answer]:
        """The answers that came from another engine than the one asked for."""
        return [answer for answer in self.answers if answer.model != answer.expected]


class Clients:
    """Programs that ask for models in an order of their own, each one request at a time."""

    def __init__(
        self,
        url: str,
        ledger: Ledger,
        by_size: Mapping[int, str],
        tokens: Mapping[str, int] | None = None,
        seed: int = 1,
    ) -> None:
        self.ledger = ledger
        self.tokens = tokens or {}  # of an answer, by model
        self.by_size = by_size
        self.random = random.Random(seed)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.anthropic = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=60)

    def start(self, stop: asyncio.Event) -> list[asyncio.Task[None]]:
        """Start them all; each ends by itself once ``stop`` is set and its last answer has arrived."""
        programs: dict[str, Callable[[], Awaitable[Answer]]] = {
            "chat with quill": lambda: self.chat("quill", "quill", self.tokens["quill"]),
            "chat with quill, streaming": lambda: self.stream("quill", "gpt-4o-mini", 2 * self.tokens["quill"]),
            "chat with atlas": lambda: self.chat("atlas", "atlas", self.tokens["atlas"]),
            "chat with either, streaming": self.either,
            "messages to atlas": lambda: self.messages("atlas", "claude-haiku", self.tokens["atlas"]),
            "embeddings": lambda: self.embed("vector", "text-embedding-3-small"),
        }
        return [
            asyncio.create_task(self.repeat(name, request, stop), name=name) for name, request in programs.items()
        ]

    async def close(self) -> None:
        """Close the connections."""
        await self.openai.close()
        await self.anthropic.close()

    async def repeat(self, name: str, request: Callable[[], Awaitable[Answer]], stop: asyncio.Event) -> None:
        """Send a request, think for a moment, and again."""
        while not stop.is_set():
            self.ledger.open += 1
            try:
                self.ledger.answers.append(await request())
            except (openai.OpenAIError, anthropic.AnthropicError) as error:
                self.ledger.failures.append(f"{name}: {type(error).__name__}: {error}")
            finally:
                self.ledger.open -= 1
            await asyncio.sleep(self.random.uniform(0.05, 0.5))

    async def either(self) -> Answer:
        """Stream from one of the two chat models."""
        model = self.random.choice(["quill", "atlas"])
        return await self.stream(model, model, self.tokens[model])

    async def chat(self, expected: str, name: str, tokens: int) -> Answer:
        """Ask for a chat completion."""
        raw = await self.openai.chat.completions.with_raw_response.create(
            model=name, messages=[{"role": "user", "content": self.prompt()}], max_tokens=tokens
        )
        answer = raw.parse()
        return Answer(expected, answer.model, waited(raw.headers), answer.usage.total_tokens)

    async def stream(self, expected: str, name: str, tokens: int) -> Answer:
        """Ask for a chat completion, piece by piece."""
        began = time.monotonic()
        raw = await self.openai.chat.completions.with_raw_response.create(
            model=name,
            messages=[{"role": "user", "content": self.prompt()}],
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        models, used = set(), 0
        async for chunk in raw.parse():
            models.add(chunk.model)
            used = chunk.usage.total_tokens if chunk.usage else used
        return Answer(expected, " and ".join(sorted(models)), waited(raw.headers), used, time.monotonic() - began)

    async def messages(self, expected: str, name: str, tokens: int) -> Answer:
        """Ask in Anthropic's way."""
        raw = await self.anthropic.messages.with_raw_response.create(
            model=name, messages=[{"role": "user", "content": self.prompt()}], max_tokens=tokens
        )
        parsed = raw.parse()
        answer = await parsed if inspect.isawaitable(parsed) else parsed  # it depends on the SDK's version
        return Answer(
            expected, answer.model, waited(raw.headers), answer.usage.input_tokens + answer.usage.output_tokens
        )

    async def embed(self, expected: str, name: str) -> Answer:
        """Ask for the embeddings of three texts."""
        raw = await self.openai.embeddings.with_raw_response.create(
            model=name, input=[self.prompt() for _ in range(3)], encoding_format="float"
        )
        answer = raw.parse()
        # Here llama.cpp repeats the name that was asked for; the length of its vectors gives the engine away.
        sizes = {len(item.embedding) for item in answer.data}
        model = self.by_size.get(sizes.pop(), "unknown") if len(sizes) == 1 else "unknown"
        return Answer(expected, model, waited(raw.headers), answer.usage.total_tokens)

    def prompt(self) -> str:
        """Return a few words."""
        return " ".join(self.random.choices(WORDS, k=self.random.randint(5, 40)))


def waited(headers: Mapping[str, str]) -> float:
    """Return how long llmux says that the request waited."""
    return float(headers["x-llmux-queue-seconds"])
