"""What goes over the wire about batches: OpenAI's objects, with what is ours beside it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from loramill.schemas.job import MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE, MAX_PRIORITY, JobError, JobStatus

LEAST_WINDOW_S = 600
MOST_WINDOW_S = 30 * 86400
_WINDOW = re.compile(r"([0-9]{1,7})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
Metadata = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=MAX_METADATA_KEY)],
        Annotated[str, Field(max_length=MAX_METADATA_VALUE)],
    ],
    Field(max_length=MAX_METADATA),
]


class RequestCounts(BaseModel):
    """Rows of a batch, as far as they are known."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class CachedTokens(BaseModel):
    """Of the input."""

    cached_tokens: int = 0


class ReasoningTokens(BaseModel):
    """Of the output."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of the rows that have their result."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class BatchErrors(BaseModel):
    """Why the input of a batch was refused: the first hundred problems."""

    object: Literal["list"] = "list"
    data: list[JobError]


class BatchExtras(BaseModel):
    """What OpenAI's batches do not have."""

    priority: int
    on_invalid: Literal["fail", "skip"]
    retry_of: str | None


class BatchObject(BaseModel):
    """A batch. Times are in seconds since 1970; what is not known yet is null."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    """What answers all of its rows, if that is one."""
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: JobStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None
    loramill: BatchExtras


class BatchList(BaseModel):
    """Some batches, the newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OutputExpiresAfter(BaseModel):
    """How long the files of results are kept."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class BatchOptions(BaseModel):
    """What OpenAI's creates do not have."""

    model_config = ConfigDict(extra="forbid")

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    on_invalid: Literal["fail", "skip"] = "fail"


class BatchCreate(BaseModel):
    """The body of a create."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    endpoint: Endpoint
    completion_window: Annotated[str, Field(examples=["24h"])]
    """Ten minutes to thirty days, as `10m`, `24h`, `30d`: what is not finished by then expires."""
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None
    loramill: BatchOptions = BatchOptions()

    @field_validator("completion_window")
    @classmethod
    def _spans(cls, text: str) -> str:
        window_s(text)
        return text


class BatchRetry(BaseModel):
    """The body of a retry; none is the same as an empty one."""

    model_config = ConfigDict(extra="forbid")

    failed_only: bool = False
    """Leaves out rows that never ran."""


class ResultLine(BaseModel):
    """A row's line as it is in the output file or the error file."""

    id: str
    custom_id: str | None
    response: dict[str, Any] | None
    error: dict[str, Any] | None


class ResultFeed(BaseModel):
    """Rows as they were committed, each once."""

    object: Literal["list"] = "list"
    data: list[ResultLine]
    rows: list[int]
    """Where each of them is in the input, from 0."""
    next: int
    """What `after` has to be to get those that follow."""
    has_more: bool
    """False once the batch's rows have all been given, and no more will come."""


class BatchEvent(BaseModel):
    """Something that happened to a batch's job."""

    number: int
    at: float
    """In seconds since 1970."""
    what: str


def window_s(text: str) -> float:
    """Seconds of a completion window. Raises ValueError."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not LEAST_WINDOW_S <= seconds <= MOST_WINDOW_S:
        raise ValueError('a window is "24h", or 10m to 30d written like that')
    return float(seconds)
