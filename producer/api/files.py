"""/v1/files: put in as they come, read from any byte."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from loramill.producer.api import ranges
from loramill.producer.api.contents import Contents, StoredFile, Writing
from loramill.producer.api.context import Api, ApiOf, Caller, CallerOf
from loramill.producer.api.errors import ApiError, invalid, not_found
from loramill.producer.api.receiving import in_thread, over_quota, received, room, used
from loramill.schemas.file_objects import ExpiresAfter, FileDeleted, FileList, FileObject
from loramill.store.shelf import RecordNotFound

router = APIRouter()

MAX_NAME = 255
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_BINARY = {"type": "string", "format": "binary"}
_FORM = {
    "type": "object",
    "additionalProperties": False,
    "required": ["file", "purpose"],
    "properties": {
        "file": _BINARY | {"description": f"Its name ends in {', '.join(_SUFFIXES)}."},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": {"application/octet-stream": {"schema": _BINARY}}},
    206: {"description": "The bytes asked for", "content": {"application/octet-stream": {"schema": _BINARY}}},
    304: {"description": "The client has it"},
}


def form_body(schema: dict[str, Any]) -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads a form by itself."""
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post("/v1/files", openapi_extra=form_body(_FORM))
async def create_file(request: Request, api: ApiOf, caller: CallerOf) -> FileObject:
    """Stores a batch's input. It is there once all of it has arrived, and not before."""
    files, most = Contents(api.shelf), api.limits.file_bytes
    too_large = ApiError(413, f"a file is at most {most} bytes", code="file_too_large", param="file")
    may = await in_thread(api, lambda: room(api, caller, most, too_large))

    def begin(filename: str) -> Writing:
        return files.begin(caller.name, checked_name(filename), "batch", max_bytes=may.bytes)

    async with received(request, api, may, "file", begin) as (writing, fields):
        checked_purpose(fields.get("purpose"))
        ttl_s = _expiry(fields)
        writing.ttl_s = api.limits.retention_s if ttl_s is None else ttl_s
        file = await in_thread(api, lambda: finish(api, caller, writing))
    return file.object()


@router.get("/v1/files")
def list_files(
    api: ApiOf,
    caller: CallerOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    """The caller's files in the order of their creation."""
    try:
        page, more = Contents(api.shelf).list(
            caller.name, after=after, limit=limit, oldest_first=order == "asc", purpose=purpose
        )
    except RecordNotFound:
        raise not_found("file", after or "", param="after") from None
    data = [file.object() for file in page]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=first, last_id=last, has_more=more)


@router.get("/v1/files/{file_id}")
def retrieve_file(file_id: str, api: ApiOf, caller: CallerOf) -> FileObject:
    """What is known of a file."""
    return _find(api, caller, file_id).object()


@router.delete("/v1/files/{file_id}")
def delete_file(file_id: str, api: ApiOf, caller: CallerOf) -> FileDeleted:
    """Removes it, for good."""
    try:
        Contents(api.shelf).remove(caller.name, file_id)
    except RecordNotFound:
        raise not_found("file", file_id) from None
    return FileDeleted(id=file_id)


@router.get("/v1/files/{file_id}/content", response_class=Response, responses=_BYTES)
def read_file(
    file_id: str,
    api: ApiOf,
    caller: CallerOf,
    wanted: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The file, or one range of its bytes; several ranges are answered by the whole file."""
    file = _find(api, caller, file_id)
    headers = _headers(file)
    if ranges.has_it(if_none_match, headers["etag"]):
        return Response(status_code=304, headers={"etag": headers["etag"]})
    try:
        part = ranges.asked(wanted, file.bytes) if if_range in (None, headers["etag"]) else None
    except ranges.Unsatisfiable:
        none = {"content-range": f"bytes */{file.bytes}"}
        raise ApiError(416, f"the file has {file.bytes} bytes", code="range_not_satisfiable", headers=none) from None
    start, stop = part or (0, file.bytes)
    if part is not None:
        headers |= {"content-range": f"bytes {start}-{stop - 1}/{file.bytes}", "content-length": str(stop - start)}
    pieces = Contents(api.shelf).read(file, start, stop)
    return StreamingResponse(pieces, 200 if part is None else 206, headers, media_type="application/octet-stream")


@router.head("/v1/files/{file_id}/content", response_class=Response, responses={200: _BYTES[200]})
def describe_file(file_id: str, api: ApiOf, caller: CallerOf) -> Response:
    """The headers of the whole file."""
    return Response(headers=_headers(_find(api, caller, file_id)), media_type="application/octet-stream")


def checked_name(filename: str, param: str = "file") -> str:
    """Without the folders that some clients send. Raises ApiError for a name that a batch's input cannot have."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    if not name:
        raise invalid("the file has no name", param=param, code="missing_required_parameter")
    if len(name) > MAX_NAME or re.search(r"[\x00-\x1f\x7f]", name):
        raise invalid(f"a file's name has at most {MAX_NAME} characters, and none that control", param=param)
    if not name.lower().endswith(_SUFFIXES):
        raise invalid(f"{name}: a batch's file ends in {', '.join(_SUFFIXES)}", param=param, code="invalid_file_type")
    return name


def checked_purpose(purpose: str | None) -> None:
    """Raises ApiError for all but `batch`: nothing here would read other files."""
    if purpose is None:
        raise invalid("there is no purpose", param="purpose", code="missing_required_parameter")
    if purpose != "batch":
        raise invalid("the purpose must be batch", param="purpose", code="invalid_purpose")


def finish(api: Api, caller: Caller, writing: Writing, param: str = "file") -> StoredFile:
    """What was written, unless it is nothing, or too much with what was written meanwhile."""
    if not writing.bytes:
        raise invalid("the file is empty", param=param, code="empty_file")
    writing.renew()
    if used(api, caller) > caller.quota.stored_bytes:
        raise over_quota(caller)
    return writing.finish()


def _find(api: Api, caller: Caller, file_id: str) -> StoredFile:
    try:
        return Contents(api.shelf).find(caller.name, file_id)
    except RecordNotFound:
        raise not_found("file", file_id) from None


def _expiry(fields: dict[str, str]) -> float | None:
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise invalid(f"{unknown[0]} is not known here", param=unknown[0], code="unknown_parameter")
    given = {name[14:-1]: value for name, value in fields.items() if name.startswith("expires_after[")}
    if not given:
        return None
    try:
        return ExpiresAfter.model_validate(given).seconds
    except ValidationError:
        said = "expires_after: anchor must be created_at, and seconds 3600 to 2592000"
        raise invalid(said, param="expires_after") from None


def _headers(file: StoredFile) -> dict[str, str]:
    return {
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "content-length": str(file.bytes),
        "etag": f'"{file.sha256}"',
        "x-content-type-options": "nosniff",
    }
