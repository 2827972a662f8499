"""Objects of the server, and how lists of them are read. Every task may raise Refused and Unreachable."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from loramill.producer.remote.steps import Call, Item, Steps, asked
from loramill.schemas.adapter_objects import AdapterDeleted, AdapterObject
from loramill.schemas.batch_objects import BatchObject
from loramill.schemas.file_objects import FileDeleted, FileObject

M = TypeVar("M", bound=BaseModel)

PAGE = 100


class Model(BaseModel):
    """The base, or an adapter, by the name that rows give."""

    model_config = ConfigDict(extra="allow")

    id: str
    created: int


def one(model: type[M], call: Call, patience_s: float) -> Steps[M]:
    """An object."""
    reply = yield from asked(call, patience_s)
    return model.model_validate_json(reply.content)


def each(model: type[BaseModel], path: str, patience_s: float, **params: str | int | None) -> Steps[None]:
    """All objects of a list, as items, a page at a time."""
    after: str | None = None
    while True:
        given = {name: value for name, value in {**params, "after": after}.items() if value is not None}
        reply = yield from asked(Call("GET", path, given), patience_s)
        page: Mapping[str, Any] = json.loads(reply.content)
        for said in page["data"]:
            yield Item(model.model_validate(said))
        if not page.get("has_more") or not page["data"]:
            return
        after = page["data"][-1]["id"]


def file(file_id: str, patience_s: float) -> Steps[FileObject]:
    """What is known of a file."""
    return one(FileObject, Call("GET", f"files/{file_id}"), patience_s)


def files(purpose: str | None, patience_s: float) -> Steps[None]:
    """All files, as items."""
    return each(FileObject, "files", patience_s, limit=PAGE, purpose=purpose)


def delete_file(file_id: str, patience_s: float) -> Steps[FileDeleted]:
    """Removes it. What was removed before a lost answer was asked for again is Refused, 404."""
    return one(FileDeleted, Call("DELETE", f"files/{file_id}"), patience_s)


def batches(patience_s: float) -> Steps[None]:
    """All batches, as items."""
    return each(BatchObject, "batches", patience_s, limit=PAGE)


def cancel(batch_id: str, patience_s: float) -> Steps[BatchObject]:
    """The batch, about to end."""
    return one(BatchObject, Call("POST", f"batches/{batch_id}/cancel"), patience_s)


def retry(batch_id: str, failed_only: bool, patience_s: float) -> Steps[BatchObject]:
    """A new batch."""
    key = {"idempotency-key": secrets.token_urlsafe(24)}
    asked_for = {"failed_only": failed_only}
    return one(BatchObject, Call("POST", f"batches/{batch_id}/retry", json=asked_for, headers=key), patience_s)


def models(patience_s: float) -> Steps[None]:
    """The base and every adapter, as items."""
    return each(Model, "models", patience_s)


def adapters(patience_s: float) -> Steps[None]:
    """Every adapter, as items."""
    return each(AdapterObject, "adapters", patience_s)


def load_adapter(name: str, source: str | None, scale: float | None, patience_s: float) -> Steps[AdapterObject]:
    """The adapter, wanted from now on."""
    wanted = {"name": name, "source": source, "scale": scale}  # the server knows what null stands for
    return one(AdapterObject, Call("POST", "adapters", json=wanted), patience_s)


def unload_adapter(name: str, patience_s: float) -> Steps[AdapterDeleted]:
    """No longer wanted."""
    return one(AdapterDeleted, Call("DELETE", f"adapters/{name}"), patience_s)
