"""Requests for chat completions."""

from __future__ import annotations

from typing import Any

from llmux.targets.codecs.request import (
    CHOSEN,
    TOOL_CALL,
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
    join,
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
    unseal,
    whole,
)

OWN = frozenset(
    {
        "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "metadata",
        "modalities", "moderation", "n", "prediction", "presence_penalty", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "seed", "service_tier", "store",
        "top_logprobs", "verbosity", "web_search_options",
    }
)  # fmt: skip
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_SYSTEM = frozenset({"system", "developer"})
_HERE = "chat completions"


def decode(document: dict[str, Any], losses: Losses) -> Request:
    """Read a request. BadRequestError for what is malformed, or has no place in the neutral form."""
    left = mapping(document, "the body")
    request = Request(text(left.pop("model", ""), "model"))
    for value, at in items(left.pop("messages", []), "messages"):
        request.turns.append(_turn(mapping(value, at), at, losses))
    for value, at in items(left.pop("tools", []), "tools"):
        _tool(mapping(value, at), at, request, losses)
    if (value := left.pop("tool_choice", None)) is not None:
        request.choice = read_choice(value, losses, _HERE, "function")
    request.parallel = take(left, "parallel_tool_calls", flag)
    request.stream = take(left, "stream", flag)
    options = mapping(left.pop("stream_options", {}), "stream_options")
    request.usage_in_stream = bool(options.pop("include_usage", False))
    options.pop("include_obfuscation", None)
    nothing_else(options, "stream_options", losses)
    most = left.pop("max_tokens", None)
    most = left.pop("max_completion_tokens", most)
    request.max_tokens = None if most is None else number(most, "max_tokens")
    request.temperature = take(left, "temperature", number)
    request.top_p = take(left, "top_p", number)
    if (value := left.pop("stop", None)) is not None:
        request.stop = [value] if isinstance(value, str) else [text(item, at) for item, at in items(value, "stop")]
    request.effort = take(left, "reasoning_effort", text)
    if (value := left.pop("response_format", None)) is not None:
        wanted = mapping(value, "response_format")
        request.format = read_format(wanted, losses, "response_format", _HERE, "json_schema")
    request.user = take(left, "user", text)
    request.options = left
    return request


def _turn(left: dict[str, Any], at: str, losses: Losses) -> Turn:
    role = text(left.pop("role", ""), f"{at}.role")
    if role not in _ROLES:
        raise cannot(f"{at}.role", f"there is no role {role!r} in other dialects")
    left.pop("name", None)  # of a participant: a hint
    content = _content(left.pop("content", []), f"{at}.content", losses)
    if role == "tool":
        given = text(left.pop("tool_call_id", ""), f"{at}.tool_call_id")
        kept = [part for part in content if isinstance(part, Text | Image | Document)]
        turn = Turn(role, [Result(given, kept)], at)
    else:
        turn = Turn(role, [*_thoughts(left, at), *content], at)
        if refusal := left.pop("refusal", None):
            turn.parts.append(Refusal(text(refusal, f"{at}.refusal")))
        for value, call_at in items(left.pop("tool_calls", []), f"{at}.tool_calls"):
            turn.parts.append(_call(mapping(value, call_at), call_at, losses))
        if not left.get("annotations", True):
            left.pop("annotations")
    nothing_else(left, at, losses)
    return turn


def _thoughts(left: dict[str, Any], at: str) -> list[Part]:
    spoken = left.pop("reasoning_content", None) or left.pop("reasoning", None) or ""
    left.pop("reasoning", None)
    found: list[Part] = []
    for value, detail_at in items(left.pop("reasoning_details", []), f"{at}.reasoning_details"):
        detail = mapping(value, detail_at)
        if "data" in detail:
            found.append(Redacted(text(detail["data"], f"{detail_at}.data")))
        elif "signature" in detail:
            thought = text(detail.get("text", ""), f"{detail_at}.text")
            found.append(Thinking(thought, text(detail["signature"], f"{detail_at}.signature")))
    thoughts = [part for part in found if isinstance(part, Thinking)]
    if len(thoughts) == 1 and not thoughts[0].text:
        thoughts[0].text = text(spoken, f"{at}.reasoning_content")
    elif not thoughts and spoken:
        found.insert(0, Thinking(text(spoken, f"{at}.reasoning_content")))
    return found


def _content(value: Any, at: str, losses: Losses) -> list[Part]:
    if isinstance(value, str):
        return [Text(value)] if value else []
    found: list[Part] = []
    for item, item_at in items(value, at):
        left = mapping(item, item_at)
        match left.pop("type", None):
            case "text":
                found.append(Text(text(left.pop("text", None), f"{item_at}.text")))
            case "refusal":
                found.append(Refusal(text(left.pop("refusal", None), f"{item_at}.refusal")))
            case "image_url":
                found.append(_image(left.pop("image_url", None), f"{item_at}.image_url"))
            case "file":
                found += _file(mapping(left.pop("file", None), f"{item_at}.file"), f"{item_at}.file", losses)
            case kind:
                losses.loss(item_at, f"parts of the type {kind!r} are only known to chat completions")
                continue
        nothing_else(left, item_at, losses)
    return found


def _image(value: Any, at: str) -> Image:
    left = {"url": value} if isinstance(value, str) else mapping(value, at)
    return read_image(text(left.get("url"), f"{at}.url"), take(left, "detail", text, f"{at}."))


def _file(left: dict[str, Any], at: str, losses: Losses) -> list[Part]:
    title = left.get("filename")
    inline = parse_data_url(text(left["file_data"], f"{at}.file_data")) if "file_data" in left else None
    if inline is not None:
        return [Document(inline[0], inline[1], title=title)]
    losses.loss(f"{at}.file_id" if "file_id" in left else at, "a file must come with the request, as a data URL")
    return []


def _call(left: dict[str, Any], at: str, losses: Losses) -> Call:
    kind = left.pop("type", "function")
    left.pop("index", None)
    if kind != "function":
        raise cannot(f"{at}.type", f"calls of the type {kind!r} are only known to chat completions")
    function = mapping(left.pop("function", None), f"{at}.function")
    call = Call(
        text(left.pop("id", ""), f"{at}.id"),
        text(function.pop("name", None), f"{at}.function.name"),
        text(function.pop("arguments", ""), f"{at}.function.arguments"),
    )
    nothing_else(left, at, losses)
    return call


def _tool(left: dict[str, Any], at: str, request: Request, losses: Losses) -> None:
    kind = left.pop("type", "function")
    if kind != "function":
        losses.loss(at, f"tools of the type {kind!r} are only known to chat completions")
        return
    function = mapping(left.pop("function", None), f"{at}.function")
    request.tools.append(
        Tool(
            text(function.pop("name", None), f"{at}.function.name"),
            function.pop("description", None),
            whole(function.pop("parameters", {}), f"{at}.function.parameters"),
            function.pop("strict", None),
        )
    )
    nothing_else(function, f"{at}.function", losses)
    nothing_else(left, at, losses)


# ---- and back


def encode(request: Request, losses: Losses, names: ToolNames) -> dict[str, Any]:
    """Write a request. BadRequestError for what has no place in it."""
    document: dict[str, Any] = {"model": request.model, "messages": _messages(request, losses, names)}
    if request.tools:
        document["tools"] = [_tool_document(tool, names) for tool in request.tools]
    choice = request.choice
    if choice is not None and (request.tools or choice.kind in {"any", "tool"}):
        document["tool_choice"] = (
            {"type": "function", "function": {"name": names.fit(choice.name or "")}}
            if choice.kind == "tool"
            else CHOSEN[choice.kind]
        )
    if request.parallel is not None and request.tools:
        document["parallel_tool_calls"] = request.parallel
    if request.stream is not None:
        document["stream"] = request.stream
    if request.stream:
        document["stream_options"] = {"include_usage": True}  # the client is told what it wants to know
    for name, value in (
        ("max_tokens", request.max_tokens),
        ("temperature", request.temperature),
        ("top_p", request.top_p),
        ("reasoning_effort", request.effort),
        ("user", None if request.user is None else short_user(request.user)),
    ):
        if value is not None:
            document[name] = value
    if request.stop:
        document["stop"] = request.stop
    if request.format is not None:
        document["response_format"] = _format_document(request.format)
    return document | keep_options(request, OWN, losses)


def _messages(request: Request, losses: Losses, names: ToolNames) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for turn in _alternating(request.turns):
        if turn.role == "assistant":
            found.append(_assistant(turn, losses, names))
            continue
        shown: list[Any] = []
        for part in turn.parts:
            if isinstance(part, Result):
                found.append({"role": "tool", "tool_call_id": short_id(part.id), "content": told(part)})
                shown += [inner for inner in part.parts if not isinstance(inner, Text)]
        shown += [part for part in turn.parts if not isinstance(part, Result)]
        if shown or not turn.parts:
            role = "user" if turn.role == "tool" else turn.role
            found.append({"role": role, "content": _content_document(shown, turn.at, losses)})
    return found


def _alternating(turns: list[Turn]) -> list[Turn]:
    """Return turns as every template takes them: one system, first of all, and no two of the user in a row.

    What a system or developer says before the first answer belongs to the first. The user tells the rest, where it
    stands: a beginning that changes later would cost the engine what it has cached.
    """
    answered = next((at for at, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
    first = [turn for turn in turns[:answered] if turn.role in _SYSTEM]
    found = [Turn("system", [part for turn in first for part in turn.parts], first[0].at)] if first else []
    for turn in (*(turn for turn in turns[:answered] if turn.role not in _SYSTEM), *turns[answered:]):
        role = "user" if turn.role in _SYSTEM else turn.role
        if (
            role == "user"
            and found
            and found[-1].role == role
            and not any(isinstance(p, Result) for p in turn.parts)
        ):
            found[-1] = Turn(role, [*found[-1].parts, *turn.parts], found[-1].at)
        else:
            found.append(Turn(role, turn.parts, turn.at))
    return found


def _assistant(turn: Turn, losses: Losses, names: ToolNames) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    calls, thoughts, refusals, said, details = [], [], [], [], []
    extra: dict[str, Any] = {}  # what an engine wants back with its calls, as Gemini's does, by their ids
    for index, part in enumerate(turn.parts):
        match part:
            case Call():
                function = {"name": names.fit(part.name), "arguments": part.arguments}
                call = {"id": short_id(part.id), "type": "function", "function": function}
                calls.append(call if part.id not in extra else {**call, "extra_content": extra[part.id]})
            case Thinking():
                thoughts.append(part.text)
                if (detail := unseal(part.signature)) is not None:
                    details.append({**detail, "text": part.text} if part.text else detail)
                elif part.signature:
                    losses.loss(f"{turn.at}.content[{index}].signature", "only its own provider understands it")
            case Redacted():
                detail = unseal(part.data)
                if detail is not None and detail.get("type") == TOOL_CALL:
                    extra[str(detail.get("id"))] = detail.get("extra_content")
                elif detail is not None:
                    details.append(detail)
                else:
                    losses.loss(f"{turn.at}.content[{index}]", "only its own provider understands it")
            case Refusal():
                refusals.append(part.text)
            case _:
                said.append(part)
    message["content"] = _content_document(said, turn.at, losses) if said else None
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if details:
        message["reasoning_details"] = details
    if refusals:
        message["refusal"] = "\n".join(refusals)
    if calls:
        message["tool_calls"] = calls
    return message


def _content_document(parts: list[Any], at: str, losses: Losses) -> Any:
    if all(isinstance(part, Text) for part in parts):  # many engines take a text only
        return join(parts)
    found: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Text():
                found.append({"type": "text", "text": part.text})
            case Refusal():
                found.append({"type": "refusal", "refusal": part.text})
            case Image():
                url = part.url if part.data is None else data_url(part.media_type, part.data)
                detail = {} if part.detail is None else {"detail": part.detail}
                found.append({"type": "image_url", "image_url": {"url": url, **detail}})
            case Document(text=str(plain)):
                found.append({"type": "text", "text": plain if part.title is None else f"{part.title}\n{plain}"})
            case Document(data=str(data)):
                title = {} if part.title is None else {"filename": part.title}
                file = {**title, "file_data": data_url(part.media_type, data)}
                found.append({"type": "file", "file": file})
            case _:
                losses.loss(f"{at}.content", "chat completions take files only with the request")
    return found or ""


def _tool_document(tool: Tool, names: ToolNames) -> dict[str, Any]:
    function: dict[str, Any] = {"name": names.fit(tool.name)}
    schema = object_schema(tool.schema) if tool.schema else None
    for name, value in (("description", tool.description), ("parameters", schema), ("strict", tool.strict)):
        if value is not None:
            function[name] = value
    return {"type": "function", "function": function}


def _format_document(wanted: Format) -> dict[str, Any]:
    if wanted.schema is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": named_schema(wanted)}
