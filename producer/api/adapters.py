"""`/v1/adapters`: which there are, and what operators have workers load and let go of while they run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from loramill.producer.adapter_wishes import ANSWER_S, LOOK_S, Catalogue, Heard, check_source, heard, look, workers_of
from loramill.producer.api.context import Api, ApiOf, Caller, CallerOf, OperatorOf
from loramill.producer.api.errors import invalid, not_found
from loramill.schemas.adapter_objects import AdapterDeleted, AdapterList, AdapterLoad, AdapterObject, AdapterWish
from loramill.store.wishes import Wish, find_wish, say, take_back

router = APIRouter()
_UNANSWERED = "No worker has answered yet; those that run next will see it too"


def _said_later(model: type) -> dict[int | str, dict[str, Any]]:
    return {202: {"model": model, "description": _UNANSWERED}}


@router.get("/v1/adapters")
def list_adapters(api: ApiOf, caller: CallerOf) -> AdapterList:
    """Those that the caller may use."""
    catalogue = look(api.store, api.base)
    names = {name for name in catalogue.adapters if caller.may_use(name)}
    data = list(catalogue.objects(names, operator=caller.operator))
    return AdapterList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


@router.get("/v1/adapters/{name}")
def get_adapter(name: str, api: ApiOf, caller: CallerOf) -> AdapterObject:
    """One of them."""
    return _object(look(api.store, api.base), name, caller)


@router.post("/v1/adapters", responses=_said_later(AdapterObject))
async def load_adapter(asked: AdapterLoad, api: ApiOf, caller: OperatorOf, response: Response) -> AdapterObject:
    """Has every worker load an adapter, or look at its files again; those that start later do so as well. Rows that
    were submitted before keep the content that they were checked for."""
    if not caller.may_use(asked.name):
        raise not_found("adapter", asked.name, param="name")
    if asked.scale == 0:
        raise invalid("scale: a strength of 0 is the base", param="scale")
    if asked.source is not None:
        try:
            check_source(asked.source)
        except ValueError as error:
            raise invalid(f"source: {error}", param="source") from error
    wanted = AdapterWish(wanted=True, source=asked.source, scale=asked.scale)
    wish = await run_in_threadpool(say, api.shelf, asked.name, wanted)
    said = await _answer(api, wish, lambda said: bool(said.heeded or (said.refused and not said.waiting)))
    if said.refused and not said.heeded:
        raise invalid(f"adapter `{asked.name}`: {said.why}", param="source", code="adapter_refused")
    response.status_code = 200 if said.heeded else 202
    return await run_in_threadpool(lambda: _object(look(api.store, api.base), asked.name, caller))


@router.delete("/v1/adapters/{name}", responses=_said_later(AdapterDeleted))
async def unload_adapter(name: str, api: ApiOf, caller: OperatorOf, response: Response) -> AdapterDeleted:
    """Has every worker let go of an adapter once the rows that run with it are done, be it one that they were started
    with. Rows that wait for it go on waiting, for its return or for a worker of another kind."""
    catalogue = await run_in_threadpool(look, api.store, api.base)
    if not caller.may_use(name) or name not in catalogue.adapters:
        raise not_found("adapter", name)
    if leading := catalogue.leading_to(name):
        raise invalid(f"adapter `{name}`: {leading} leads to it", code="adapter_in_use")
    former = await run_in_threadpool(find_wish, api.shelf, name)
    wish = await run_in_threadpool(say, api.shelf, name, AdapterWish(wanted=False))
    said = await _answer(api, wish, lambda said: bool(said.refused) or (bool(said.heeded) and not said.waiting))
    if said.refused:
        await run_in_threadpool(take_back, api.shelf, wish, former)
        raise invalid(f"adapter `{name}`: {said.why}", code="adapter_in_use")
    deleted = bool(said.heeded) and not said.waiting
    response.status_code = 200 if deleted else 202
    return AdapterDeleted(id=name, deleted=deleted)


async def _answer(api: Api, wish: Wish, enough: Callable[[Heard], bool]) -> Heard:
    """What workers make of a wish, as soon as that is enough, or when nobody will wait any longer."""
    until_s = time.monotonic() + ANSWER_S
    while True:
        said = heard(wish, await run_in_threadpool(workers_of, api.store, api.base))
        if enough(said) or time.monotonic() >= until_s:
            return said
        await asyncio.sleep(LOOK_S)


def _object(catalogue: Catalogue, name: str, caller: Caller) -> AdapterObject:
    if caller.may_use(name):
        for found in catalogue.objects({name}, operator=caller.operator):
            return found
    raise not_found("adapter", name)
