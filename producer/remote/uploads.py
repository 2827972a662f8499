"""A local file to the server: in one request, or in parts of which each is sent again by itself."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

from loramill.producer.remote.errors import ClientError
from loramill.producer.remote.slices import Form, Slice
from loramill.producer.remote.steps import Call, Do, Steps, asked
from loramill.schemas.file_objects import FileObject, UploadObject, UploadPart

PART_BYTES = 2**26
"""The most that OpenAI's API, and so the server, takes as one part."""
COMPLETE_S = 3600.0
"""For the server to read all parts once more, some gigabytes of them."""
_READ_BYTES = 2**20


def upload(file: BinaryIO, filename: str, purpose: str, part_bytes: int, patience_s: float) -> Steps[FileObject]:
    """The file that the server has now. Raises Refused, Unreachable."""
    size = os.fstat(file.fileno()).st_size
    if size <= part_bytes:
        form = Form("file", filename, Slice(file, 0, size), {"purpose": purpose})
        reply = yield from asked(Call("POST", "files", form=form), patience_s)
        return FileObject.model_validate_json(reply.content)
    wanted = {"bytes": size, "filename": filename, "mime_type": "application/jsonl", "purpose": purpose}
    reply = yield from asked(Call("POST", "uploads", json=wanted), patience_s)
    begun = UploadObject.model_validate_json(reply.content)
    try:
        parts = []
        for start in range(0, size, part_bytes):
            content = Slice(file, start, min(start + part_bytes, size))
            part = Call("POST", f"uploads/{begun.id}/parts", form=Form("data", "data", content))
            reply = yield from asked(part, patience_s)
            parts.append(UploadPart.model_validate_json(reply.content).id)
        md5 = yield Do(lambda: _md5(file, size))
        # Asked again, it is answered the same.
        path, wanted_parts = f"uploads/{begun.id}/complete", {"part_ids": parts, "md5": md5}
        reply = yield from asked(Call("POST", path, json=wanted_parts, timeout_s=COMPLETE_S), patience_s)
    except ClientError:
        yield from _quietly(Call("POST", f"uploads/{begun.id}/cancel"))
        raise
    done = UploadObject.model_validate_json(reply.content)
    if done.file is None:
        raise ClientError(f"the upload {begun.id} is {done.status}, and there is no file of it")
    return done.file


def _quietly(call: Call) -> Steps[None]:
    """Once, for tidiness: what the server would do by itself in time."""
    try:
        yield call
    except ClientError:
        return


def _md5(file: BinaryIO, size: int) -> str:
    digest, at = hashlib.md5(usedforsecurity=False), 0
    while part := os.pread(file.fileno(), min(_READ_BYTES, size - at), at):
        digest.update(part)
        at += len(part)
    return digest.hexdigest()
