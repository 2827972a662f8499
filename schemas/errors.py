"""What can be wrong with one line of the input."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum


class ErrorCode(StrEnum):
    """The codes that OpenAI's batch validation uses."""

    INVALID_JSON_LINE = "invalid_json_line"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    URL_MISMATCH = "url_mismatch"
    MODEL_NOT_FOUND = "model_not_found"
    EMPTY_FILE = "empty_file"
    TOO_MANY_TASKS = "too_many_tasks"
    INVALID_REQUEST = "invalid_request"
    TOKEN_LIMIT_EXCEEDED = "token_limit_exceeded"


class LineError(ValueError):
    """One line cannot be run; the message says what to change, in one line, whatever names it has from there."""

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str | None = None) -> None:
        self.message = printable(message)
        super().__init__(self.message)
        self.code = code
        self.param = param
        """The field, as a dotted path (`messages.0.content`); None when it is the line as a whole."""
        self.custom_id = custom_id
        """The line's id, where it could be read."""


def invalid(message: str, param: str | None = None) -> LineError:
    """A LineError with the code of an ordinary bad request."""
    return LineError(ErrorCode.INVALID_REQUEST, message, param)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing when none is near."""
    by_lower = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean `{by_lower[near[0]]}`?" if near else ""


def printable(text: str) -> str:
    """Text that others wrote, safe for a terminal: what would move the cursor or change colours is spelled out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
