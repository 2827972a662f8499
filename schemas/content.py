"""The prompt of a row: text, token ids, or messages flattened to plain text."""

from __future__ import annotations

from typing import Any

from .errors import LineError, invalid
from .fields import unknown_field

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

MAX_TOKEN_ID = 2**31 - 1
# Chat templates know `system`; `developer` is OpenAI's newer name for the same thing, and most templates raise on it.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_FIELDS = frozenset({"role", "content"})
# What an assistant message copied from a response carries along; null or empty there means absent.
_MESSAGE_UNSUPPORTED = frozenset(
    {"name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations", "reasoning_content"}
)


def check_messages(value: Any) -> list[Message]:
    """Messages as chat templates take them: content is a string, text parts joined by newlines (as vLLM does).

    Raises LineError.
    """
    if not isinstance(value, list):
        raise invalid("`messages` must be a list of messages", "messages")
    if not value:
        raise invalid("`messages` is empty", "messages")
    return [_message(message, index) for index, message in enumerate(value)]


def check_prompt(value: Any) -> str | list[int]:
    """A text or token-id prompt; a list of exactly one of these is taken for it. Raises LineError."""
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > 1:
            raise invalid("`prompt` holds several prompts; give one prompt a line", "prompt")
        value = value[0]
    if not isinstance(value, (str, list)):
        raise invalid("`prompt` must be a string or a list of token ids", "prompt")
    if not value:
        raise invalid("`prompt` is empty", "prompt")
    if isinstance(value, list):
        check_token_ids(value, "prompt")
    return value


def check_token_ids(value: list[Any], param: str) -> None:
    """Every element is a non-negative int. Raises LineError."""
    if not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in value):
        raise invalid(f"`{param}` must hold token ids only: integers from 0", param)


def _message(message: Any, index: int) -> Message:
    where = f"messages.{index}"
    if not isinstance(message, dict):
        raise invalid(f"`{where}` must be an object with `role` and `content`", where)
    role = message.get("role")
    content = message.get("content")
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        if role == "tool" or role == "function":
            raise invalid(f"`{where}.role`: messages of role `{role}` are not supported", f"{where}.role")
        raise invalid(f"`{where}.role` must be one of {', '.join(_ROLES)}", f"{where}.role")
    if len(message) > 2:
        _check_extra(message, where)
    if not isinstance(content, str):
        content = _join_parts(content, f"{where}.content")
    return {"role": known, "content": content}


def _check_extra(message: dict[str, Any], where: str) -> None:
    for name in sorted(message.keys() - _MESSAGE_FIELDS):
        if name not in _MESSAGE_UNSUPPORTED:
            raise unknown_field(name, _MESSAGE_FIELDS, f"{where}.")
        if message[name] not in (None, [], ""):
            raise invalid(f"`{where}.{name}` is not supported", f"{where}.{name}")


def _join_parts(content: Any, where: str) -> str:
    if not isinstance(content, list) or not content:
        raise invalid(f"`{where}` must be a string or a non-empty list of text parts", where)
    return "\n".join(_part(part, f"{where}.{index}") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise invalid(f'`{where}` must be a part like {{"type": "text", "text": ...}}', where)
    if part["type"] != "text":
        raise _unsupported_part(part["type"], where)
    if not isinstance(part.get("text"), str):
        raise invalid(f"`{where}.text` must be a string", f"{where}.text")
    if len(part) > 2:
        raise unknown_field(min(part.keys() - {"type", "text"}), frozenset({"type", "text"}), f"{where}.")
    text: str = part["text"]
    return text


def _unsupported_part(kind: str, where: str) -> LineError:
    return invalid(f"`{where}`: parts of type `{kind[:32]}` are not supported, only `text`", f"{where}.type")
