"""/v1/uploads: a file that comes in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import orjson
from fastapi import APIRouter, Request

from loramill.producer.api.contents import Contents, StoredFile, Writing, new_id
from loramill.producer.api.context import Api, ApiOf, Caller, CallerOf
from loramill.producer.api.errors import ApiError, invalid, not_found
from loramill.producer.api.files import checked_name, checked_purpose, finish, form_body
from loramill.producer.api.parts import Parts, file_id_of
from loramill.producer.api.receiving import in_thread, received, room
from loramill.schemas.file_objects import FileObject, UploadAsked, UploadCompleted, UploadObject, UploadPart
from loramill.store.shelf import Record, RecordNotFound

router = APIRouter()

KIND = "upload"
UPLOAD_S = 3600
"""From its creation; it is not there any longer, nor are its parts."""
_LOCK_S = 600.0
_PART_FORM = {
    "type": "object",
    "additionalProperties": False,
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}


@dataclass(slots=True, frozen=True)
class _Upload:
    """What a record says."""

    bytes: int
    filename: str
    ttl_s: float | None
    status: str = "pending"
    part_ids: Sequence[str] = ()


@router.post("/v1/uploads")
def create_upload(asked: UploadAsked, api: ApiOf, caller: CallerOf) -> UploadObject:
    """A file to come, of at most so many bytes in all; it waits an hour for its parts."""
    checked_purpose(asked.purpose)
    most = api.limits.file_bytes
    too_large = ApiError(413, f"a file is at most {most} bytes", code="file_too_large", param="bytes")
    may = room(api, caller, most, too_large)
    if asked.bytes > may.bytes:
        raise may.refusal
    ttl_s = asked.expires_after.seconds if asked.expires_after else api.limits.retention_s
    upload = _Upload(asked.bytes, checked_name(asked.filename, param="filename"), ttl_s)
    record = api.shelf.put(KIND, new_id("upload_"), caller.name, orjson.dumps(upload), ttl_s=UPLOAD_S)
    return _object(record, upload)


@router.post("/v1/uploads/{upload_id}/parts", openapi_extra=form_body(_PART_FORM))
async def add_part(upload_id: str, request: Request, api: ApiOf, caller: CallerOf) -> UploadPart:
    """Some of its bytes; what order they come in is said when it is completed."""
    record, upload = await in_thread(api, lambda: _find(api, caller, upload_id))
    _must_be_pending(upload)
    most = api.limits.part_bytes
    too_large = ApiError(413, f"a part is at most {most} bytes", code="part_too_large", param="data")
    may = await in_thread(api, lambda: room(api, caller, most, too_large))

    def begin(filename: str) -> Writing:
        return Parts(api.shelf).add(caller.name, upload_id, may.bytes)

    async with received(request, api, may, "data", begin) as (writing, fields):
        for name in fields:
            raise invalid(f"{name} is not known here", param=name, code="unknown_parameter")
        part = await in_thread(api, lambda: finish(api, caller, writing, param="data"))
    return UploadPart(id=part.id, created_at=part.created_at, upload_id=record.id)


@router.post("/v1/uploads/{upload_id}/complete")
def complete_upload(upload_id: str, asked: UploadCompleted, api: ApiOf, caller: CallerOf) -> UploadObject:
    """Makes a file of its parts, which are read once, and not copied. The same again is answered the same."""
    with _alone(api, caller, upload_id):
        record, upload = _find(api, caller, upload_id)
        if upload.status == "completed" and list(upload.part_ids) == asked.part_ids:
            return _object(record, upload, _file(api, caller, upload_id))
        _must_be_pending(upload)
        parts = _parts(api, caller, upload_id, upload, asked.part_ids)
        sha256, md5 = _digests(Parts(api.shelf), parts)
        if asked.md5 not in (None, md5):
            raise invalid(f"what was uploaded has the MD5 {md5}", param="md5", code="md5_mismatch")
        file = Contents(api.shelf).join(
            parts, caller.name, upload.filename, "batch",
            id=file_id_of(upload_id), sha256=sha256, ttl_s=upload.ttl_s,
        )  # fmt: skip
        if file.sha256 != sha256:
            raise _ended("completed with other parts")
        upload = replace(upload, status="completed", part_ids=asked.part_ids)
        record = api.shelf.replace(record, orjson.dumps(upload), ttl_s=UPLOAD_S)
        Parts(api.shelf).drop(caller.name, upload_id)
        return _object(record, upload, file.object())


@router.post("/v1/uploads/{upload_id}/cancel")
def cancel_upload(upload_id: str, api: ApiOf, caller: CallerOf) -> UploadObject:
    """Forgets its parts, and takes no more."""
    with _alone(api, caller, upload_id):
        record, upload = _find(api, caller, upload_id)
        _must_be_pending(upload)
        upload = replace(upload, status="cancelled")
        record = api.shelf.replace(record, orjson.dumps(upload), ttl_s=UPLOAD_S)
        Parts(api.shelf).drop(caller.name, upload_id)
        return _object(record, upload)


@contextmanager
def _alone(api: Api, caller: Caller, upload_id: str) -> Iterator[None]:
    """Raises ApiError (409, which clients try again) while another request ends the same upload."""
    name, holder = f"upload:{caller.name}:{upload_id}", new_id("")
    if not api.shelf.lock(name, holder, _LOCK_S):
        raise ApiError(409, f"{upload_id} is being completed or cancelled", code="upload_busy")
    try:
        yield
    finally:
        api.shelf.unlock(name, holder)


def _find(api: Api, caller: Caller, upload_id: str) -> tuple[Record, _Upload]:
    try:
        record = api.shelf.get(KIND, upload_id)
    except RecordNotFound:
        raise not_found("upload", upload_id) from None
    if record.owner != caller.name:
        raise not_found("upload", upload_id)
    return record, _Upload(**orjson.loads(record.data))


def _file(api: Api, caller: Caller, upload_id: str) -> FileObject | None:
    try:
        return Contents(api.shelf).find(caller.name, file_id_of(upload_id)).object()
    except RecordNotFound:  # deleted since
        return None


def _must_be_pending(upload: _Upload) -> None:
    if upload.status != "pending":
        raise _ended(upload.status)


def _ended(how: str) -> ApiError:
    never = {"x-should-retry": "false"}
    return ApiError(409, f"the upload was {how} already", code="upload_not_pending", headers=never)


def _parts(api: Api, caller: Caller, upload_id: str, upload: _Upload, part_ids: Sequence[str]) -> list[StoredFile]:
    there = {part.id: part for part in Parts(api.shelf).list(caller.name, purpose=upload_id)[0]}
    unknown = [part_id for part_id in part_ids if part_id not in there]
    if unknown:
        raise not_found("part", unknown[0], param="part_ids")
    if len(set(part_ids)) < len(part_ids):
        raise invalid("a part is named twice", param="part_ids")
    parts = [there[part_id] for part_id in part_ids]
    came = sum(part.bytes for part in parts)
    if came != upload.bytes:
        said = f"the parts come to {came} bytes, and the upload was to have {upload.bytes}"
        raise invalid(said, param="part_ids", code="upload_size_mismatch")
    return parts


def _digests(contents: Contents, parts: Sequence[StoredFile]) -> tuple[str, str]:
    """SHA-256 and MD5 of the parts one after another."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for part in parts:
        for data in contents.read(part):
            sha256.update(data)
            md5.update(data)
    return sha256.hexdigest(), md5.hexdigest()


def _object(record: Record, upload: _Upload, file: FileObject | None = None) -> UploadObject:
    created_at = record.created_ms // 1000
    return UploadObject.model_validate(
        {
            "id": record.id, "bytes": upload.bytes, "created_at": created_at, "expires_at": created_at + UPLOAD_S,
            "filename": upload.filename, "purpose": "batch", "status": upload.status, "file": file,
        }
    )  # fmt: skip
