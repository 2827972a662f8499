"""A job as it crosses process boundaries: what was asked for, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_PRIORITY = 100
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


class JobStatus(StrEnum):
    """OpenAI's batch states."""

    VALIDATING = "validating"
    """Its shards are being stored; no worker sees it."""
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    """Its window has passed; workers are letting go of its rows."""
    COMPLETED = "completed"
    FAILED = "failed"
    """The input was invalid; nothing ran."""
    CANCELLING = "cancelling"
    """Workers are letting go of its rows."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """Whether it stays so."""
        return self in ENDED


ENDED = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})


class Lane(StrEnum):
    """Which queue a job waits in."""

    BULK = "bulk"
    ASK = "ask"
    """A question that somebody waits for: one row, before all others."""


class Pinned(BaseModel):
    """What a name stood for when the job was checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    scale: float = 1.0


class JobNames(BaseModel):
    """What the job's rows may name, as far as they do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    adapters: Mapping[str, Pinned] = {}
    aliases: Mapping[str, Mapping[str, float]] = {}
    routes: Mapping[str, Mapping[str, str]] = {}


class JobSpec(BaseModel):
    """What was asked for. It never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    base_id: str
    """Which workers can run it: Manifest.base_id."""
    names: JobNames
    endpoint: str | None = None
    """The one `url` of all lines, where there is only one."""
    seed: int = 0
    """For rows without a seed of their own."""
    dedupe: bool = True
    """Whether identical rows that must come to the same answer are computed once."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    window_s: Annotated[float, Field(gt=0)] | None = None
    """From acceptance; what is not finished by then expires."""
    metadata: Mapping[str, str] = {}
    input_name: str = "rows"
    input_sha256: str = ""
    retry_of: str | None = None
    lane: Lane = Lane.BULK
    stream: bool = False
    """Whether its answers are said on the channel of its id while they are made."""
    owner: str = ""
    """Whose key it was submitted with; "" of commands, and where there are no keys."""


class JobError(BaseModel):
    """Why a job's input was refused: one line's problem."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    message: str
    line: int | None = None
    param: str | None = None
