"""Whoever a test wants to be: in place of keys in a file."""

from __future__ import annotations

from collections.abc import Mapping

from loramill.producer.api.context import Caller


class Callers:
    """Who asks, by token; any other token is one of a caller of that name without rights beyond its own things."""

    open = False

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = callers

    def caller(self, token: str | None) -> Caller | None:
        return self._callers.get(token, Caller(token, operator=False)) if token else None
