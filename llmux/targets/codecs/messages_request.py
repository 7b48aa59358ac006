"""Requests for messages."""

from __future__ import annotations

import json
from typing import Any

from llmux.targets.codecs.request import (
    Call,
    Choice,
    Document,
    Format,
    Image,
    Losses,
    Part,
    Redacted,
    Refusal,
    Request,
    Result,
    Text,
    Thinking,
    Tool,
    ToolNames,
    Turn,
    arguments_object,
    cannot,
    fitted,
    flag,
    items,
    keep_options,
    mapping,
    nothing_else,
    number,
    object_schema,
    opaque_user,
    take,
    text,
    whole,
    wrong,
)

MAX_TOKENS = 8192
"""Tokens of an answer, where the client does not limit them: the dialect has no "as many as it takes"."""

OWN = frozenset({"container", "context_management", "inference_geo", "mcp_servers", "service_tier", "speed"})
_TIERS = {"auto": "auto", "default": "auto", "standard_only": "standard_only"}
_CHOICES = {"auto": "auto", "none": "none", "any": "any", "tool": "tool"}
_TOOL_HINTS = frozenset({"cache_control", "eager_input_streaming", "defer_loading", "input_examples"})
# How many tokens each effort may think, and the least budget that counts as that effort.
BUDGETS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 24576, "xhigh": 32768}
_EFFORTS = ((16384, "high"), (4096, "medium"), (0, "low"))
_LEAST_BUDGET = 1024
# Values that leave the history as it is.
_ALL_OF_IT: tuple[Any, ...] = ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]})
_JPEG = {"image/jpg": "image/jpeg"}  # as it is called by mistake


def decode(document: dict[str, Any], losses: Losses) -> Request:
    """Read a request. BadRequestError for what is malformed, or has no place in the neutral form."""
    left = mapping(document, "the body")
    request = Request(text(left.pop("model", ""), "model"))
    if (system := left.pop("system", None)) is not None:
        request.turns.append(Turn("system", _blocks(system, "system", losses), "system"))
    for value, at in items(left.pop("messages", []), "messages"):
        request.turns.append(_turn(mapping(value, at), at, losses))
    for value, at in items(left.pop("tools", []), "tools"):
        _tool(mapping(value, at), at, request, losses)
    if (value := left.pop("tool_choice", None)) is not None:
        _choice(mapping(value, "tool_choice"), request, losses)
    request.stream = take(left, "stream", flag)
    request.max_tokens = take(left, "max_tokens", number)
    request.temperature = take(left, "temperature", number)
    request.top_p = take(left, "top_p", number)
    if (value := left.pop("stop_sequences", None)) is not None:
        request.stop = [text(item, at) for item, at in items(value, "stop_sequences")]
    metadata = mapping(left.pop("metadata", {}), "metadata")
    request.user = take(metadata, "user_id", text, "metadata.")
    for name in metadata:
        losses.hint(f"metadata.{name}")
    if (value := left.pop("thinking", None)) is not None:
        _thinking(mapping(value, "thinking"), request, losses)
    output = mapping(left.pop("output_config", {}), "output_config")
    if "output_format" in left:  # as it was called first
        output.setdefault("format", left.pop("output_format"))
    _output(output, request, losses)
    if left.pop("cache_control", None) is not None:
        losses.hint("cache_control")
    if left.get("context_management") in _ALL_OF_IT:
        left.pop("context_management")
    request.options = left
    return request


def _turn(left: dict[str, Any], at: str, losses: Losses) -> Turn:
    role = text(left.pop("role", ""), f"{at}.role")
    if role not in {"user", "assistant", "system"}:
        raise cannot(f"{at}.role", f"there is no role {role!r} in messages")
    parts = _blocks(left.pop("content", []), f"{at}.content", losses)
    nothing_else(left, at, losses)
    results = [part for part in parts if isinstance(part, Result)]
    if results:  # these come first, whatever order the client chose
        parts = [*results, *(part for part in parts if not isinstance(part, Result))]
    return Turn(role, parts, at)


def _blocks(value: Any, at: str, losses: Losses) -> list[Part]:
    if isinstance(value, str):
        return [Text(value)] if value else []
    found: list[Part] = []
    for item, item_at in items(value, at):
        left = mapping(item, item_at)
        if left.pop("cache_control", None) is not None:
            losses.hint(f"{item_at}.cache_control")
        part = _block(left, item_at, losses)
        if part is not None:
            found.append(part)
            nothing_else(left, item_at, losses)
    return found


def _block(left: dict[str, Any], at: str, losses: Losses) -> Part | None:
    kind = left.pop("type", None)
    match kind:
        case "text":
            if not left.get("citations", True):
                left.pop("citations")
            return Text(text(left.pop("text", None), f"{at}.text"))
        case "image":
            return _image(mapping(left.pop("source", None), f"{at}.source"), f"{at}.source")
        case "document":
            return _document(left, at, losses)
        case "tool_use":
            arguments = json.dumps(
                whole(left.pop("input", {}), f"{at}.input"), ensure_ascii=False, separators=(",", ":")
            )
            left.pop("caller", None)
            return Call(
                text(left.pop("id", None), f"{at}.id"), text(left.pop("name", None), f"{at}.name"), arguments
            )
        case "tool_result":
            inner = _blocks(left.pop("content", []), f"{at}.content", losses)
            kept = [part for part in inner if isinstance(part, Text | Image | Document)]
            return Result(
                text(left.pop("tool_use_id", None), f"{at}.tool_use_id"), kept, bool(left.pop("is_error", False))
            )
        case "thinking":
            signature = text(left.pop("signature", ""), f"{at}.signature")
            return Thinking(text(left.pop("thinking", None), f"{at}.thinking"), signature)
        case "redacted_thinking":
            return Redacted(text(left.pop("data", None), f"{at}.data"))
    losses.loss(at, f"blocks of the type {kind!r} are only known to messages")
    return None


def _image(source: dict[str, Any], at: str) -> Image:
    match source.get("type"):
        case "base64":
            return Image(
                text(source.get("media_type"), f"{at}.media_type"), text(source.get("data"), f"{at}.data")
            )
        case "url":
            return Image(url=text(source.get("url"), f"{at}.url"))
    raise cannot(at, "an image must come with the request, or be at a URL")


def _document(left: dict[str, Any], at: str, losses: Losses) -> Document | None:
    source = mapping(left.pop("source", None), f"{at}.source")
    citations = left.pop("citations", None)
    if isinstance(citations, dict) and citations.get("enabled"):
        losses.loss(f"{at}.citations")
    title = left.pop("title", None)
    context = left.pop("context", None)
    if context is not None:
        losses.loss(f"{at}.context")
    match source.get("type"):
        case "base64":
            return Document(source.get("media_type"), text(source.get("data"), f"{at}.source.data"), title=title)
        case "text":
            return Document(
                source.get("media_type"), text=text(source.get("data"), f"{at}.source.data"), title=title
            )
        case "url":
            return Document(url=text(source.get("url"), f"{at}.source.url"), title=title)
    losses.loss(f"{at}.source", "a document must come with the request, or be at a URL")
    return None


def _tool(left: dict[str, Any], at: str, request: Request, losses: Losses) -> None:
    kind = left.pop("type", "custom")
    if kind != "custom":
        losses.loss(at, f"only providers of messages have the tool {kind!r}")
        return
    for name in _TOOL_HINTS & left.keys():
        left.pop(name)
        losses.hint(f"{at}.{name}")
    request.tools.append(
        Tool(
            text(left.pop("name", None), f"{at}.name"),
            left.pop("description", None),
            whole(left.pop("input_schema", {}), f"{at}.input_schema"),
            left.pop("strict", None),
        )
    )
    nothing_else(left, at, losses)


def _choice(left: dict[str, Any], request: Request, losses: Losses) -> None:
    kind = text(left.pop("type", None), "tool_choice.type")
    if kind not in _CHOICES:
        raise cannot("tool_choice.type", f"there is no choice {kind!r} in messages")
    name = left.pop("name", None)
    request.choice = Choice(_CHOICES[kind], None if name is None else text(name, "tool_choice.name"))
    alone = left.pop("disable_parallel_tool_use", None)
    if alone is not None:
        request.parallel = not flag(alone, "tool_choice.disable_parallel_tool_use")
    nothing_else(left, "tool_choice", losses)


def _thinking(left: dict[str, Any], request: Request, losses: Losses) -> None:
    match left.pop("type", None):
        case "enabled":
            budget = number(left.pop("budget_tokens", 0), "thinking.budget_tokens")
            if budget < 0:
                raise wrong("thinking.budget_tokens", "a number of tokens")
            request.effort = next(effort for least, effort in _EFFORTS if budget >= least)
        case "disabled":
            request.effort = "none"
        case "adaptive":
            pass
        case kind:
            raise cannot("thinking.type", f"there is no thinking {kind!r} in messages")
    if left.pop("display", None) is not None:
        losses.hint("thinking.display")
    nothing_else(left, "thinking", losses)


def _output(left: dict[str, Any], request: Request, losses: Losses) -> None:
    if (effort := left.pop("effort", None)) is not None:
        effort = text(effort, "output_config.effort")
        request.effort = "xhigh" if effort == "max" else effort
    if (value := left.pop("format", None)) is not None:
        wanted = mapping(value, "output_config.format")
        if wanted.get("type") != "json_schema":
            raise cannot("output_config.format", "this format is not known")
        request.format = Format(whole(wanted.get("schema"), "output_config.format.schema"))
    nothing_else(left, "output_config", losses)


# ---- and back


def encode(request: Request, losses: Losses, names: ToolNames) -> dict[str, Any]:
    """Write a request. BadRequestError for what has no place in it."""
    system, messages = _messages(request, losses, names)
    limit = request.max_tokens
    if limit is None:
        limit = MAX_TOKENS + BUDGETS.get(request.effort or "", 0)
    document: dict[str, Any] = {"model": request.model, "max_tokens": limit}
    if system:
        document["system"] = _joined(system)
    document["messages"] = messages
    if request.tools:
        document["tools"] = [_tool_document(tool, names) for tool in request.tools]
    choice = _choice_document(request, names)
    if choice is not None:
        document["tool_choice"] = choice
    for name in ("stream", "temperature", "top_p"):
        if (value := getattr(request, name)) is not None:
            document[name] = value
    if request.stop:
        document["stop_sequences"] = request.stop
    if request.user is not None:
        document["metadata"] = {"user_id": opaque_user(request.user)}
    if request.effort is not None:
        _think(request, document, losses)
    if request.format is not None:
        if request.format.schema is None:
            losses.loss("response_format", "messages have no JSON without a schema")
        else:
            document["output_config"] = {"format": {"type": "json_schema", "schema": request.format.schema}}
        if request.format.description is not None:
            losses.hint("response_format.description")
    kept = keep_options(request, OWN, losses)
    if (tier := kept.pop("service_tier", None)) is not None:
        if text(tier, "service_tier") in _TIERS:
            document["service_tier"] = _TIERS[tier]
        else:
            losses.hint("service_tier")
    return document | kept


def _messages(request: Request, losses: Losses, names: ToolNames) -> tuple[list[Text], list[dict[str, Any]]]:
    """Return what the system says, which is said first of all, and the turns."""
    system: list[Text] = []
    found: list[dict[str, Any]] = []
    results: list[Any] | None = None  # the content of a turn that goes on while there are results
    left_out = False  # a turn that says nothing was between this and the one before
    for turn in request.turns:
        if turn.role in {"system", "developer"}:
            system += _said(turn, losses)
            continue
        blocks = [
            block for part in turn.parts if (block := _block_document(part, turn, losses, names)) is not None
        ]
        if turn.role == "tool" and results is not None:
            results += blocks
            continue
        if turn.role == "user" and results is not None:
            results += blocks
            results = None
            continue
        role = "assistant" if turn.role == "assistant" else "user"
        if not blocks:
            left_out = True
            continue
        if left_out and found and found[-1]["role"] == role:
            blocks = found[-1]["content"] = [*found[-1]["content"], *blocks]
        else:
            found.append({"role": role, "content": blocks})
        left_out = False
        results = blocks if turn.role == "tool" else None
    for message in found:
        message["content"] = _plain(message["content"])
    return system, found


def _said(turn: Turn, losses: Losses) -> list[Text]:
    for part in turn.parts:
        if not isinstance(part, Text):
            losses.loss(f"{turn.at}.content", "the system can only say texts in messages")
    return [part for part in turn.parts if isinstance(part, Text) and part.text.strip()]


def _joined(system: list[Text]) -> Any:
    return system[0].text if len(system) == 1 else [{"type": "text", "text": part.text} for part in system]


def _plain(blocks: list[dict[str, Any]]) -> Any:
    return blocks[0]["text"] if len(blocks) == 1 and blocks[0]["type"] == "text" else blocks


def _block_document(part: Part, turn: Turn, losses: Losses, names: ToolNames) -> dict[str, Any] | None:
    match part:
        case Text() | Refusal():
            return {"type": "text", "text": part.text} if part.text.strip() else None
        case Image():
            return _image_document(part, turn, losses)
        case Document():
            return _document_document(part)
        case Call():
            arguments = arguments_object(part, f"{turn.at}.tool_calls", losses)
            return {"type": "tool_use", "id": fitted(part.id), "name": names.fit(part.name), "input": arguments}
        case Result():
            inner = [
                block for each in part.parts if (block := _block_document(each, turn, losses, names)) is not None
            ]
            said = _plain(inner) if inner else ""
            block = {"type": "tool_result", "tool_use_id": fitted(part.id), "content": said}
            return {**block, "is_error": True} if part.failed else block
        case Thinking(signature=""):
            losses.loss(f"{turn.at}.reasoning_content", "messages take no thinking without its signature")
            return None
        case Thinking():
            return {"type": "thinking", "thinking": part.text, "signature": part.signature}
        case Redacted():
            return {"type": "redacted_thinking", "data": part.data}


def _image_document(image: Image, turn: Turn, losses: Losses) -> dict[str, Any]:
    if image.detail not in {None, "auto"}:
        losses.hint(f"{turn.at}.content[].image_url.detail")
    if image.data is None:
        return {"type": "image", "source": {"type": "url", "url": image.url}}
    media_type = image.media_type or "image/png"
    source = {"type": "base64", "media_type": _JPEG.get(media_type, media_type), "data": image.data}
    return {"type": "image", "source": source}


def _document_document(part: Document) -> dict[str, Any]:
    if part.text is not None:
        source = {"type": "text", "media_type": part.media_type or "text/plain", "data": part.text}
    elif part.data is not None:
        source = {"type": "base64", "media_type": part.media_type or "application/pdf", "data": part.data}
    else:
        source = {"type": "url", "url": part.url or ""}
    block: dict[str, Any] = {"type": "document", "source": source}
    return block if part.title is None else {**block, "title": part.title}


def _tool_document(tool: Tool, names: ToolNames) -> dict[str, Any]:
    document: dict[str, Any] = {"name": names.fit(tool.name)}
    if tool.description is not None:
        document["description"] = tool.description
    document["input_schema"] = object_schema(tool.schema)
    if tool.strict is not None:
        document["strict"] = tool.strict
    return document


def _choice_document(request: Request, names: ToolNames) -> dict[str, Any] | None:
    choice = request.choice
    if not request.tools and (choice is None or choice.kind in {"auto", "none"}):
        return None
    if choice is None and request.parallel is None:
        return None
    document: dict[str, Any] = {"type": "auto" if choice is None else choice.kind}
    if choice is not None and choice.name is not None:
        document["name"] = names.fit(choice.name)
    if request.parallel is not None and document["type"] != "none":
        document["disable_parallel_tool_use"] = not request.parallel
    return document


def _think(request: Request, document: dict[str, Any], losses: Losses) -> None:
    """Ask for thinking: within the limit of the answer, of which it is a part."""
    effort = request.effort
    if effort == "none":
        document["thinking"] = {"type": "disabled"}
        return
    budget = BUDGETS.get(effort or "", BUDGETS["medium"])
    if request.max_tokens is not None:
        budget = min(budget, int(request.max_tokens) // 2)
    if budget < _LEAST_BUDGET:
        losses.loss("reasoning_effort", "there are too few tokens to think and to answer")
        return
    document["thinking"] = {"type": "enabled", "budget_tokens": budget}
