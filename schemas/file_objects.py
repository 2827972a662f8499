"""Files and uploads as OpenAI's clients see them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_UPLOAD_PARTS = 2000


class FileObject(BaseModel):
    """A file. Times are in seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    """There are no others: a file is there once all of it is."""
    status_details: str | None = None


class FileDeleted(BaseModel):
    """What is said of a file that was removed."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(BaseModel):
    """One page."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ExpiresAfter(BaseModel):
    """How long a file is kept: an hour to 30 days."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class UploadAsked(BaseModel):
    """What an upload is to become."""

    model_config = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(gt=0)]
    filename: Annotated[str, Field(json_schema_extra={"pattern": r"^[^\x00-\x1f\x7f/\\]{1,240}\.jsonl(\.gz|\.zst)?$"})]
    mime_type: str
    purpose: Annotated[str, Field(json_schema_extra={"enum": ["batch"]})]
    expires_after: ExpiresAfter | None = None


class UploadObject(BaseModel):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled"]
    file: FileObject | None = None


class UploadPart(BaseModel):
    """One of its parts."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class UploadCompleted(BaseModel):
    """Which parts, in what order, and what they must come to."""

    model_config = ConfigDict(extra="forbid")

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_UPLOAD_PARTS)]
    md5: str | None = None
