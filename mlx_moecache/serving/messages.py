"""The messages and tools of a chat request, checked and in the form that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from .api_errors import RequestError, bad, shown
from .fields import check_text

ROLES = ("system", "developer", "user", "assistant", "tool")


def parse_messages(value: object) -> tuple[dict[str, Any], ...]:
    """Messages with text as content; developer is called system, as templates know it. Raises RequestError."""
    if not isinstance(value, list) or not value:
        raise bad(f"messages must be a list of at least one message, not {shown(value)}", "messages")
    return tuple(_message(m, f"messages[{i}]") for i, m in enumerate(value))


def parse_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Tools as they are, if each is a function with a name. Raises RequestError."""
    if not isinstance(value, list):
        raise bad(f"tools must be a list, not {shown(value)}", "tools")
    for i, tool in enumerate(value):
        where = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise bad(f'{where} must be {{"type": "function", "function": {{...}}}}, not {shown(tool)}', where)
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad(f"{where}.function.name must be a string, not {shown(function.get('name'))}", where)
        if not isinstance(function.get("parameters") or {}, dict):
            raise bad(f"{where}.function.parameters must be an object, not {shown(function['parameters'])}", where)
        check_text(json.dumps(tool, ensure_ascii=False), where)
    return tuple(value)


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad(f"{where} must be an object with role and content, not {shown(message)}", where)
    role = message.get("role")
    if role not in ROLES:
        raise bad(f"{where}.role must be one of {', '.join(ROLES)}, not {shown(role)}", f"{where}.role")
    calls = message.get("tool_calls")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if message.get("content") is None and not (role == "assistant" and calls):
        raise bad(f"{where}.content must be a string", f"{where}.content")
    made["content"] = _content(message.get("content"), f"{where}.content")
    if calls:
        made["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise bad(f"{where}.{name} must be a string, not {shown(message[name])}", f"{where}.{name}")
            made[name] = check_text(message[name], f"{where}.{name}")
    return made


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return check_text(content, where)
    if not isinstance(content, list):
        raise bad(f"{where} must be a string or a list of text parts, not {shown(content)}", where)
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"not {shown(kind or part)}"
            raise bad(f'{where}[{i}] must be {{"type": "text", "text": "..."}}, {what}; only text is supported', where)
        parts.append(check_text(part["text"], where))
    return "".join(parts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Calls that the model made earlier; templates take their arguments as objects."""
    if not isinstance(calls, list):
        raise bad(f"{where} must be a list, not {shown(calls)}", where)
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(f"{where}: each call needs function.name and function.arguments, not {shown(call)}", where)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise _no_object(where, arguments) from None
        if not isinstance(arguments, dict):
            raise _no_object(where, arguments)
        call_id = call.get("id")
        made.append(
            {
                "id": call_id if isinstance(call_id, str) else "",
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    check_text(json.dumps(made, ensure_ascii=False), where)
    return made


def _no_object(where: str, arguments: object) -> RequestError:
    return bad(f"{where}: function.arguments must be a JSON object, not {shown(arguments)}", where)
