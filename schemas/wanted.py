"""Which adapters a row asks for beside its `model`: a strength, a mix, and the fields that routes go by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from .errors import invalid

MAX_SCALE = 10
MAX_MIX = 8

Scale = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)]


class Part(BaseModel):
    """One adapter of a mix."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    scale: Scale = 1.0


class Strengths(BaseModel):
    """`body.loramill` of an OpenAI line; the fields of the same names on a native one."""

    model_config = ConfigDict(strict=True, extra="forbid")

    scale: Scale | None = None
    """Of the adapter that `model` names, or that a route leads to."""
    adapters: Annotated[list[Part], Field(min_length=1, max_length=MAX_MIX)] | None = None

    @property
    def mix(self) -> tuple[tuple[str, float], ...]:
        """The adapters by the names that the row gives them, each with its strength."""
        return tuple((part.name, part.scale) for part in self.adapters or ())


def take_routes(body: dict[str, Any], fields: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Takes the route fields out of `body`, where they or its `metadata` have them: (field, value) each.

    Raises LineError for a value that is no text, or two that differ.
    """
    metadata = body.get("metadata")
    found = []
    for field in fields:
        given = [body.pop(field, None)]
        if isinstance(metadata, dict):
            given.append(metadata.get(field))
        values = {_text(value, field) for value in given if value is not None}
        if len(values) > 1:
            raise invalid(f"`{field}` and `metadata.{field}` differ; give one", field)
        found += [(field, value) for value in values]
    return tuple(found)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"`{field}` must be a string: a route goes by it", field)
    return value
