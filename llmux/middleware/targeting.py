"""Requests for names that are neither models nor aliases: their targets, and the changes to such requests.

A variant changes the request's body; for a virtual model, or a name of remotes, a target is chosen. Imported only
if the configuration has such names.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aiohttp import web

from llmux.aiohttp_internals import answer_has_begun
from llmux.config import Config
from llmux.config.targets import VariantConfig
from llmux.core import admission, residency
from llmux.core.phases import Phase
from llmux.errors import BadRequestError, RequestError
from llmux.extract import Body, BodyBudget, body_of
from llmux.middleware.context import RequestContext
from llmux.middleware.paths import Kind
from llmux.middleware.rewriting import MARKS, SERVED_BY, VARIANT, rename_in_query
from llmux.runtime import Switcher, wait_estimate
from llmux.targets.conversation import HEADER, Conversations, conversation_of
from llmux.targets.field_scanner import AT_ONCE, Rule, Rules, changes, tree
from llmux.targets.resolution import Ask, Names, Reason, Resolution, Target

if TYPE_CHECKING:
    from llmux.middleware.remotes import Remotes

_FINAL = frozenset({"stopping"})  # no other target would do better
_WORTH_ANOTHER = frozenset({408, 429})
_SERVER_ERROR = 500

Through = tuple[Reason, str]  # why, and from which name
Result = TypeVar("Result")
Serve = Callable[[web.Request, RequestContext, Body | None], Awaitable[web.StreamResponse]]


class Choice(NamedTuple):
    """What a name stands for at this moment; ``remember`` records where the request is served."""

    found: Resolution
    remember: Callable[[Target], None]
    made_by: Targeting

    @property
    def may_leave(self) -> bool:
        """Whether the request may go to another host."""
        return self.found.target.remote or any(target.remote for target in self.found.others)


class Now:
    """The present state of the models, as far as it concerns one request."""

    def __init__(self, switcher: Switcher, remotes: Remotes | None, context: RequestContext) -> None:
        self._state = switcher.core.state
        self._now = switcher.now()
        self._remotes = remotes
        self._context = context
        self.awake_only = context.passed is not None and context.passed.awake_only

    def awake(self, model: str) -> bool:
        """Whether it serves requests now."""
        found = self._state.models.get(model)
        return found is not None and found.phase is Phase.AWAKE and self._taken(model)

    def waking(self, model: str) -> bool:
        """Whether the switch under way wakes it."""
        switch = self._state.switch
        comes = switch is not None and switch.target is self._state.models.get(model)
        return comes and self.allowed(model) and self._taken(model)

    def allowed(self, model: str) -> bool:
        """Whether the request may go to a model, by its key and by what is left of its budget."""
        found = self._state.models.get(model)
        if self.awake_only:
            return found is not None and found.phase is Phase.AWAKE
        return found is not None or (self._remotes is not None and self._remotes.allows(model, self._context))

    def wait(self, model: str) -> float | None:
        """Return the expected wait of a new request; None if it would be refused."""
        if not self.allowed(model):
            return None
        found = self._state.models.get(model)
        if found is not None:
            return wait_estimate.for_a_newcomer(self._state, found, self._now)
        return None if self._remotes is None else self._remotes.wait(model, self._context)

    def switch_cost(self, model: str) -> float:
        """Return the cost of a switch to it, in seconds."""
        found = self._state.models.get(model)
        if found is None:
            return 0.0
        leaving = residency.who_leaves(self._state, found) or ()
        return 0.0 if found.phase is Phase.AWAKE else residency.switch_cost(self._state, leaving, found)

    def _taken(self, name: str) -> bool:
        model = self._state.models[name]
        room = len(model.queue) < model.spec.max_queued
        return admission.is_open(self._state, model) or (room and admission.blocked(self._state, model) is None)


class Targeting:
    """Knows the names of one configuration, and where conversations were served."""

    def __init__(
        self,
        config: Config,
        switcher: Switcher,
        remotes: Remotes | None,
        budget: BodyBudget,
        before: Targeting | None = None,
    ) -> None:
        """``before`` is that of the configuration which this one replaces."""
        self._remotes = remotes
        self._names = Names(config)
        self._variants = variants_of(config)
        self._virtual = config.virtual
        self._roles = {entry.name: entry.role for entry in config.api_keys}
        self._switcher = switcher
        self._budget = budget
        self.others = frozenset({*config.variants, *config.virtual})
        """The names that are neither models nor aliases, without those of remotes."""
        self.conversations: Conversations = Conversations() if before is None else before.conversations

    def knows(self, name: str, context: RequestContext) -> bool:
        """Whether a request may name it."""
        return name in self._names and context.route.kind is Kind.FORWARD

    def any_awake(self, name: str) -> bool:
        """Whether one of the models is awake to which a name may lead."""
        return name in self._names and any(
            self._switcher.is_awake(target.model) for target in self._names.targets(name)
        )

    def may(self, name: str, context: RequestContext) -> bool:
        """Whether a request may go to one of the remotes that a name stands for."""
        now = Now(self._switcher, self._remotes, context)
        return any(target.remote and now.allowed(target.model) for target in self._names.targets(name))

    def room(self, name: str, context: RequestContext) -> float:
        """Return how many requests like this one the remotes behind a name take now."""
        remotes = self._remotes
        if remotes is None:
            return 0
        found = [target.model for target in self._names.targets(name) if target.remote]
        return max((remotes.room(model, context) for model in found), default=0)

    async def serve(
        self,
        name: str,
        request: web.Request,
        context: RequestContext,
        body: Body | None,
        serve: Serve | None,
        *,
        through: Through | None = None,
        others: bool = False,
    ) -> web.StreamResponse:
        """Let ``serve``, or a remote, serve a request for a known name.

        ``through`` says why another name led to this one, and which. ``others``: if all fail, something else will
        be tried.

        Raises BadRequestError if the body does not take the variant's parameters, and what ``serve`` raises.
        """
        choice, context.choice = context.choice, None
        if choice is None:
            choice = await self._resolve(name, request.headers.get(HEADER), context, body, through)
        pending = [choice.found.target, *choice.found.others]
        context.may_leave = context.may_leave or choice.may_leave
        while True:
            target = pending.pop(0)
            choice.remember(target)
            sent = await self._fit(target, context, body)
            context.model = target.model
            try:
                if target.remote and self._remotes is not None:
                    more = others or bool(pending)
                    return await self._remotes.serve(target.model, request, context, sent, others=more)
                assert serve is not None
                return await serve(request, context, sent)
            except RequestError as error:
                if not pending or not may_fail_over(request, context, error):
                    raise
                context.leave(error.status)

    def at_once(
        self, name: str, given: str | None, context: RequestContext, data: bytes
    ) -> tuple[str, bytes] | None:
        """Return the model for a request on the fast path, and its body.

        ``given`` is the value of ``HEADER``. None if that would take long, or the request leaves this host:
        ``serve`` goes on with what was chosen.
        """
        if len(data) > AT_ONCE:
            return None
        told = len(context.headers)
        try:
            with body_of(data, name, self._budget) as body:
                choice = context.choice = _now(self._resolve(name, given, context, body, None))
                if choice is None or choice.found.target.remote:
                    return None
                target = choice.found.target
                fitted = _now(self._fit(target, context, body))
                if fitted is None:
                    return None
                sent = b"".join(fitted)
        except RequestError:  # it is raised again where it can be answered
            del context.headers[told:]
            return None
        choice.remember(target)
        context.model, context.may_leave = target.model, choice.may_leave
        return target.model, sent

    async def _resolve(
        self, name: str, given: str | None, context: RequestContext, body: Body | None, through: Through | None
    ) -> Choice:
        """Return the target of the request now."""
        if name not in self._virtual:
            found = self._names.resolve(name, Ask(), Now(self._switcher, self._remotes, context))
            if found.target.remote or through is not None:
                self._tell(name, found, context, through)
            else:
                self._switcher.metrics.target_chosen(name, found.target.model, found.reason)
            return Choice(found, lambda _target: None, self)
        await self._looked_at()
        holder = context.holder
        key = None if holder is None else holder.name
        conversation = await conversation_of(given, body)
        ask = Ask(
            key=key,
            role=None if key is None else self._roles.get(key),
            conversation=conversation,
            kept=self.conversations.get(name, key, conversation),
            draw=random.random(),  # noqa: S311 - a share of requests, no secret
        )
        now = Now(self._switcher, self._remotes, context)
        found = self._names.resolve(name, ask, now)
        if now.awake_only and not now.allowed(found.target.model):
            assert context.passed is not None
            context.headers.append(("x-should-retry", "false"))
            raise context.passed.gate.not_awake(context.passed.key, name)
        self._tell(name, found, context, through)
        return Choice(found, functools.partial(self.conversations.keep, name, key, conversation), self)

    async def _looked_at(self) -> None:
        """Wait until it is known what runs: the first choice after a start must not displace an awake model."""
        state = self._switcher.core.state
        if state.ready or state.stopping:
            return
        done = asyncio.get_running_loop().create_future()
        end = self._switcher.subscribe(
            lambda _effect: done.set_result(None) if (state.ready or state.stopping) and not done.done() else None
        )
        try:
            await done
        finally:
            end()

    def _tell(self, name: str, found: Resolution, context: RequestContext, through: Through | None) -> None:
        asked, reason, way = name, found.reason, found.way
        if through is not None:
            reason, asked = through
            way = (asked, *way)
        # The names that `routes` accept are the clients': there may be any number of them.
        label = asked if asked in self._names else name
        self._switcher.metrics.target_chosen(label, found.target.name, reason)
        self._switcher.choices.append(
            {
                "time": time.time(),
                "asked": asked,
                "target": found.target.name,
                "model": found.target.model,
                "reason": str(reason),
                "way": list(way),
                "request_id": context.request_id,
            }
        )

    async def _fit(self, target: Target, context: RequestContext, body: Body | None) -> Body | None:
        """Return the body for the target, and set the answer's headers."""
        if body is not None:
            if target.variant is not None:
                body = await self._variants[target.variant].apply(body)
            if not target.remote:
                body = await body.renamed(target.model)
        if not target.remote and (body is None or body.model is None):
            route = context.route
            context.route = route._replace(target=rename_in_query(route.target, target.model))
        context.headers = [field for field in context.headers if field[0] not in MARKS]
        context.headers.append((SERVED_BY, target.model))
        if target.variant is not None:
            context.headers.append((VARIANT, target.variant))
        return body


def _now(work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return the result of work that does not wait; None, and the work is broken off, when it would."""
    try:
        work.send(None)
    except StopIteration as done:
        result: Result = done.value
        return result
    work.close()
    return None


def may_fail_over(request: web.Request, context: RequestContext, error: RequestError) -> bool:
    """Whether another target may serve it: its client has had nothing of an answer, and is not to blame."""
    if answer_has_begun(request) and context.early is None:
        return False
    return error.code not in _FINAL and (error.status >= _SERVER_ERROR or error.status in _WORTH_ANOTHER)


@dataclass(frozen=True, slots=True)
class Variant:
    """A model under another name and with other parameters."""

    name: str
    model: str
    rules: Rules

    async def apply(self, body: Body) -> Body:
        """Return the body with the variant's parameters. BadRequestError if they have no place in it."""
        if not self.rules:
            return body
        if body.form or body.compressed:
            kind = "a form" if body.form else "compressed"
            raise BadRequestError(
                f"{self.name!r} is {self.model!r} with other parameters, and these have no place in a body that is"
                f" {kind}: send it as plain JSON, or ask for {self.model!r}",
                code="variant_needs_json",
                param="model",
            )
        return body.edit(await changes(body, self.rules))


def variants_of(config: Config) -> Mapping[str, Variant]:
    """Return the variants by their names."""
    return {
        name: Variant(name, model, _rules(given))
        for model, settings in config.models.items()
        for name, given in settings.variants.items()
    }


def _rules(given: VariantConfig) -> Rules:
    rules = {name: Rule(always=value, given=True) for name, value in given.set.items()}
    rules |= {name: Rule(strip=True) for name in given.strip}
    for name in [*given.default, *(name for name in given.cap if name not in given.default)]:
        rules[name] = Rule(default=given.default.get(name), cap=given.cap.get(name))
    return tree(rules)
