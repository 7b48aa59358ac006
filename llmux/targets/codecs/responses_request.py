"""Requests for responses."""

from __future__ import annotations

from typing import Any

from llmux.targets.codecs.request import (
    CHOSEN,
    Call,
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
    cannot,
    data_url,
    flag,
    items,
    keep_options,
    mapping,
    named_schema,
    nothing_else,
    number,
    object_schema,
    parse_data_url,
    read_choice,
    read_format,
    read_image,
    short_id,
    short_user,
    take,
    text,
    told,
    whole,
    wrong,
)

OWN = frozenset(
    {
        "background", "client_metadata", "conversation", "include", "max_tool_calls", "metadata", "moderation",
        "previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "top_logprobs", "truncation",
    }
)  # fmt: skip
_ROLES = frozenset({"system", "developer", "user", "assistant"})
_NOTES = "internal_chat_message_metadata_passthrough"  # of Codex, for OpenAI
_ANSWERED = frozenset({"reasoning.encrypted_content", "message.output_text.logprobs"})  # of `include`


def decode(document: dict[str, Any], losses: Losses) -> Request:
    """Read a request. BadRequestError for what is malformed, or has no place in the neutral form."""
    left = mapping(document, "the body")
    request = Request(text(left.pop("model", ""), "model"))
    if instructions := left.pop("instructions", None):
        request.turns.append(Turn("system", [Text(text(instructions, "instructions"))], "instructions"))
    _input(left.pop("input", []), request, losses)
    for value, at in items(left.pop("tools", []), "tools"):
        _tool(mapping(value, at), at, request, losses)
    names = {tool.name for tool in request.tools}
    if len(names) < len(request.tools) and any(tool.get("type") == "namespace" for tool in document["tools"]):
        raise cannot("tools", "outside of their namespaces, two of them have the same name")
    if (value := left.pop("tool_choice", None)) is not None:
        request.choice = read_choice(value, losses, "responses")
    request.parallel = take(left, "parallel_tool_calls", flag)
    request.stream = take(left, "stream", flag)
    left.pop("stream_options", None)
    request.temperature = take(left, "temperature", number)
    request.top_p = take(left, "top_p", number)
    request.max_tokens = take(left, "max_output_tokens", number)
    reasoning = mapping(left.pop("reasoning", {}), "reasoning")
    request.effort = take(reasoning, "effort", text, "reasoning.")
    for name in ("summary", "generate_summary", "context"):
        if reasoning.pop(name, None) is not None:
            losses.hint(f"reasoning.{name}")
    nothing_else(reasoning, "reasoning", losses)
    wanted = mapping(left.pop("text", {}), "text")
    if (value := wanted.pop("format", None)) is not None:
        request.format = read_format(mapping(value, "text.format"), losses, "text.format", "responses")
    if (verbosity := wanted.pop("verbosity", None)) is not None:
        left["verbosity"] = verbosity
    nothing_else(wanted, "text", losses)
    request.user = take(left, "user", text)
    if left.pop("store", False) is not False:
        losses.loss("store", "answers are not kept here")
    include = left.get("include")
    if isinstance(include, list) and _ANSWERED.issuperset(item for item in include if isinstance(item, str)):
        left.pop("include")
    request.options = left
    return request


def _input(value: Any, request: Request, losses: Losses) -> None:
    if isinstance(value, str):
        request.turns.append(Turn("user", [Text(value)], "input"))
        return
    for item, at in items(value, "input"):
        _item(mapping(item, at), at, request, losses)


def _item(left: dict[str, Any], at: str, request: Request, losses: Losses) -> None:
    kind = left.pop("type", "message")
    left.pop("id", None)
    left.pop("status", None)
    if left.pop(_NOTES, None) is not None:
        losses.hint(f"{at}.{_NOTES}")
    match kind:
        case "message":
            role = text(left.pop("role", ""), f"{at}.role")
            if role not in _ROLES:
                raise cannot(f"{at}.role", f"there is no role {role!r} in responses")
            left.pop("phase", None)
            parts = _content(left.pop("content", []), f"{at}.content", losses)
            _add(request, role, parts, at)
        case "function_call":
            space = take(left, "namespace", text, f"{at}.")
            call = Call(
                text(left.pop("call_id", None), f"{at}.call_id"),
                within(space, text(left.pop("name", None), f"{at}.name")),
                text(left.pop("arguments", ""), f"{at}.arguments"),
            )
            _add(request, "assistant", [call], at)
        case "function_call_output":
            kept = [
                part
                for part in _content(left.pop("output", []), f"{at}.output", losses)
                if isinstance(part, Text | Image | Document)
            ]
            _add(request, "tool", [Result(text(left.pop("call_id", None), f"{at}.call_id"), kept)], at)
        case "reasoning":
            if thought := _thought(left, at):
                _add(request, "assistant", thought, at)
        case "item_reference":
            raise cannot(at, "what it refers to is not kept here (clients that `store: false` send it again)")
        case _:
            losses.loss(at, f"items of the type {kind!r} are only known to responses")
            return
    nothing_else(left, at, losses)


def _add(request: Request, role: str, parts: list[Part], at: str) -> None:
    """Add to the turn under way: what a model says, thinks and calls is one turn, and so are the results."""
    last = request.turns[-1] if request.turns else None
    if (
        last is not None
        and last.role == role
        and (role == "tool" or (role == "assistant" and not _closed(last, parts)))
    ):
        last.parts += parts
    else:
        request.turns.append(Turn(role, parts, at))


def _closed(turn: Turn, parts: list[Part]) -> bool:
    """Whether a turn has said its text already, and these say more."""
    has_text = any(isinstance(part, Text) for part in turn.parts)
    has_calls = any(isinstance(part, Call) for part in turn.parts)
    return any(isinstance(part, Text) for part in parts) and (has_text or has_calls)


def _thought(left: dict[str, Any], at: str) -> list[Part]:
    summary = list(items(left.pop("summary", []), f"{at}.summary"))
    content = list(items(left.pop("content", []), f"{at}.content"))
    texts = [text(mapping(item, path).get("text", ""), f"{path}.text") for item, path in content or summary]
    secret = text(left.pop("encrypted_content", ""), f"{at}.encrypted_content")
    if not texts and secret:
        return [Redacted(secret)]
    return [Thinking("\n".join(texts), secret)] if texts else []


def _content(value: Any, at: str, losses: Losses) -> list[Part]:
    if isinstance(value, str):
        return [Text(value)] if value else []
    found: list[Part] = []
    for item, item_at in items(value, at):
        left = mapping(item, item_at)
        kind = left.pop("type", None)
        match kind:
            case "input_text" | "output_text" | "text":
                found.append(Text(text(left.pop("text", None), f"{item_at}.text")))
                for name in ("annotations", "logprobs"):
                    if not left.get(name, True):
                        left.pop(name)
            case "refusal":
                found.append(Refusal(text(left.pop("refusal", None), f"{item_at}.refusal")))
            case "input_image" if "image_url" in left:
                found.append(_image(left, item_at))
            case "input_file" if "file_data" in left or "file_url" in left:
                found.append(_file(left, item_at))
            case "input_image" | "input_file":
                losses.loss(f"{item_at}.file_id", "a file must come with the request, or be at a URL")
                continue
            case _:
                losses.loss(item_at, f"parts of the type {kind!r} are only known to responses")
                continue
        nothing_else(left, item_at, losses)
    return found


def _image(left: dict[str, Any], at: str) -> Image:
    return read_image(text(left.pop("image_url"), f"{at}.image_url"), take(left, "detail", text, f"{at}."))


def _file(left: dict[str, Any], at: str) -> Document:
    title = left.pop("filename", None)
    if (url := left.pop("file_url", None)) is not None:
        return Document(url=text(url, f"{at}.file_url"), title=title)
    inline = parse_data_url(text(left.pop("file_data"), f"{at}.file_data"))
    if inline is None:
        raise wrong(f"{at}.file_data", "a data URL")
    return Document(inline[0], inline[1], title=title)


def within(space: str | None, name: str) -> str:
    """Return the name by which dialects without namespaces know a tool of one."""
    return f"{space.removesuffix('__')}__{name}" if space else name


def _tool(left: dict[str, Any], at: str, request: Request, losses: Losses, space: str | None = None) -> None:
    kind = left.pop("type", "function")
    if kind == "namespace" and space is None:
        space = text(left.pop("name", None), f"{at}.name")
        for value, inner_at in items(left.pop("tools", []), f"{at}.tools"):
            _tool(mapping(value, inner_at), inner_at, request, losses, space)
        if left.pop("description", None) is not None:
            losses.hint(f"{at}.description")
        nothing_else(left, at, losses)
        return
    if kind != "function":
        losses.loss(at, f"only providers of responses have the tool {kind!r}")
        return
    if left.pop("defer_loading", None) is not None:
        losses.hint(f"{at}.defer_loading")
    request.tools.append(
        Tool(
            within(space, text(left.pop("name", None), f"{at}.name")),
            left.pop("description", None),
            whole(left.pop("parameters", {}), f"{at}.parameters"),
            left.pop("strict", None),
        )
    )
    nothing_else(left, at, losses)


# ---- and back


def encode(request: Request, losses: Losses, names: ToolNames) -> dict[str, Any]:
    """Write a request. BadRequestError for what has no place in it."""
    document: dict[str, Any] = {"model": request.model}
    turns = request.turns
    if turns and turns[0].role == "system" and all(isinstance(part, Text) for part in turns[0].parts):
        document["instructions"] = "\n".join(part.text for part in turns[0].parts if isinstance(part, Text))
        turns = turns[1:]
    document["input"] = [item for turn in turns for item in _items(turn, losses, names)]
    if request.tools:
        document["tools"] = [_tool_document(tool, names) for tool in request.tools]
    choice = request.choice
    if choice is not None and (request.tools or choice.kind in {"any", "tool"}):
        document["tool_choice"] = (
            {"type": "function", "name": names.fit(choice.name or "")}
            if choice.kind == "tool"
            else CHOSEN[choice.kind]
        )
    if request.parallel is not None and request.tools:
        document["parallel_tool_calls"] = request.parallel
    for name, value in (
        ("stream", request.stream),
        ("max_output_tokens", request.max_tokens),
        ("temperature", request.temperature),
        ("top_p", request.top_p),
        ("user", None if request.user is None else short_user(request.user)),
    ):
        if value is not None:
            document[name] = value
    if request.stop:
        losses.loss("stop", "responses have no stop sequences")
    if request.effort is not None:
        document["reasoning"] = {"effort": request.effort}
    wanted: dict[str, Any] = {}
    if request.format is not None:
        wanted["format"] = _format_document(request.format)
    verbosity = request.options.get("verbosity")
    if verbosity is not None:
        wanted["verbosity"] = verbosity
    if wanted:
        document["text"] = wanted
    document.setdefault("store", False)  # nothing is kept that the client did not ask to be kept
    kept = keep_options(request, OWN | {"verbosity"}, losses)
    kept.pop("verbosity", None)
    return document | kept


def _items(turn: Turn, losses: Losses, names: ToolNames) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    said: list[Any] = []
    calls: list[dict[str, Any]] = []
    for index, part in enumerate(turn.parts):
        match part:
            case Thinking():
                item: dict[str, Any] = {"type": "reasoning", "id": f"rs_{len(found)}_{index}"}
                item["summary"] = [{"type": "summary_text", "text": part.text}]
                found.append({**item, "encrypted_content": part.signature} if part.signature else item)
            case Redacted():
                item = {"type": "reasoning", "id": f"rs_{len(found)}_{index}", "summary": []}
                found.append({**item, "encrypted_content": part.data})
            case Call():
                call = {"type": "function_call", "call_id": short_id(part.id), "name": names.fit(part.name)}
                calls.append({**call, "arguments": part.arguments})
            case Result():
                item = {"type": "function_call_output", "call_id": short_id(part.id)}
                found.append({**item, "output": _output(part, turn, losses)})
            case _:
                said.append(part)
    if said:
        role = "user" if turn.role == "tool" else turn.role
        content = [_part_document(part, role, turn, losses) for part in said]
        found.append({"type": "message", "role": role, "content": [part for part in content if part is not None]})
    return found + calls


def _output(result: Result, turn: Turn, losses: Losses) -> Any:
    if all(isinstance(part, Text) for part in result.parts):
        return told(result)
    texts = [Text(told(result))] if told(result) else []
    parts = [*texts, *(part for part in result.parts if not isinstance(part, Text))]
    content = [_part_document(part, "user", turn, losses) for part in parts]
    return [part for part in content if part is not None]


def _part_document(part: Any, role: str, turn: Turn, losses: Losses) -> dict[str, Any] | None:
    match part:
        case Text() if role == "assistant":
            return {"type": "output_text", "text": part.text, "annotations": []}
        case Text():
            return {"type": "input_text", "text": part.text}
        case Refusal():
            return {"type": "refusal", "refusal": part.text}
        case Image():
            url = part.url if part.data is None else data_url(part.media_type, part.data)
            return {"type": "input_image", "image_url": url, "detail": part.detail or "auto"}
        case Document(text=str(plain)):
            return {"type": "input_text", "text": plain if part.title is None else f"{part.title}\n{plain}"}
        case Document():
            title = {} if part.title is None else {"filename": part.title}
            where = (
                {"file_url": part.url}
                if part.data is None
                else {"file_data": data_url(part.media_type, part.data)}
            )
            return {"type": "input_file", **title, **where}
    losses.loss(f"{turn.at}.content")
    return None


def _tool_document(tool: Tool, names: ToolNames) -> dict[str, Any]:
    document: dict[str, Any] = {"type": "function", "name": names.fit(tool.name)}
    if tool.description is not None:
        document["description"] = tool.description
    document["parameters"] = object_schema(tool.schema)
    document["strict"] = bool(tool.strict)  # which is true by default only here
    return document


def _format_document(wanted: Format) -> dict[str, Any]:
    return {"type": "json_object"} if wanted.schema is None else {"type": "json_schema", **named_schema(wanted)}
