"""Adapters as the HTTP API shows them, and what operators ask of workers about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SCALE = 1000.0
MAX_SOURCE = 512


class AdapterWish(BaseModel):
    """What an operator wants of every worker, beside what it was started with. Kept under the adapter's name."""

    wanted: bool
    source: str | None = None
    """A path in the worker's --adapters-dir; None is what it was started with under that name, else the name."""
    scale: float | None = None
    """None is what it was started with, else 1."""


class AdapterLoad(BaseModel):
    """The body of POST /v1/adapters."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """What rows will call it."""
    source: Annotated[str, Field(min_length=1, max_length=MAX_SOURCE)] | None = None
    """Where it is: a path in the --adapters-dir of the workers. Without one, what they were started with under that
    name, or else the folder of that name."""
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)] | None = None
    """Its strength, other than 0; 1 if nothing is said."""


class AdapterRows(BaseModel):
    """What the running workers did with an adapter since they started."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class AdapterObject(BaseModel):
    """An adapter, by one of its names."""

    id: str
    """The name."""
    object: Literal["adapter"] = "adapter"
    status: Literal["served", "waiting", "refused"]
    """Whether a running worker serves it; those that were asked to may all have refused it."""
    sha256: str | None
    """Of its content: what result lines carry. Null until a worker has opened it."""
    rank: int | None
    targets: list[str]
    scale: float
    alone: str | None
    """Why it can only be used by itself and at strength 1, if that is so."""
    workers: list[str]
    """Those that serve it."""
    resident: list[str]
    """Those that have it on their device."""
    rows: AdapterRows
    source: str | None = None
    """As an operator gave it; for operators."""
    refused: Mapping[str, str] = {}
    """Worker -> why it does not serve what was asked for; for operators."""


class AdapterList(BaseModel):
    """GET /v1/adapters: all of them, by name."""

    object: Literal["list"] = "list"
    data: list[AdapterObject]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


class AdapterDeleted(BaseModel):
    """DELETE /v1/adapters/{name}."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: bool
    """Whether no worker offers it any more. Rows that run are finished by it."""
