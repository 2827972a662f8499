"""What can stand in `model`: the base, and every adapter and alias that the caller may use."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from loramill.producer.api.asking import served_now
from loramill.producer.api.context import ApiOf, CallerOf
from loramill.producer.api.errors import ApiError
from loramill.producer.served import Served
from loramill.schemas.completion_objects import ModelList, ModelObject
from loramill.schemas.failures import Failure
from loramill.schemas.names import Names

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(api: ApiOf, caller: CallerOf) -> ModelList:
    """The base first, then adapters and aliases by name."""
    try:
        served = served_now(api)()
    except Failure:  # no worker was ever there
        return ModelList(data=[])
    names = served.offer.names.seen_by(caller.may_use)
    return ModelList(data=[_model(served, names, name) for name in _known(names)])


@router.get("/{model:path}")
def retrieve_model(model: Annotated[str, Path(min_length=1)], api: ApiOf, caller: CallerOf) -> ModelObject:
    """By any name that a question may have: `base:adapter` as well."""
    try:
        served = served_now(api)()
    except Failure:
        raise _unknown(model) from None
    names = served.offer.names.seen_by(caller.may_use)
    prefix, _, rest = model.rpartition(":")
    name = rest if prefix in (names.base, "base") and model not in names.adapters else model
    name = names.base if name == "base" and name not in names.adapters else name
    if name not in _known(names):
        raise _unknown(model)
    return _model(served, names, name)


def _known(names: Names) -> dict[str, None]:
    unusable = {name for name, named in names.adapters.items() if named.unusable is not None}
    others = (name for name in sorted([*names.adapters, *names.aliases]) if name not in names.hidden | unusable)
    # An adapter may have the base's name, and is then what it means.
    return dict.fromkeys([names.base, *others])


def _model(served: Served, names: Names, name: str) -> ModelObject:
    started_ms = min((worker.started_ms for worker in served.workers), default=0)
    is_base = name == names.base and name not in names.adapters
    return ModelObject(
        id=name,
        created=started_ms // 1000,
        root=_root(names, name),
        parent=None if is_base else names.base,
        max_model_len=served.offer.prompter.limits.max_model_len,
    )


def _root(names: Names, name: str) -> str:
    """What an alias of one thing stands for; one of several stands for itself."""
    while len(shares := names.aliases.get(name, {})) == 1:
        name = next(iter(shares))
    return names.base if name == "base" and name not in names.adapters else name


def _unknown(model: str) -> ApiError:
    shown = model if len(model) <= 128 else f"{model[:125]}..."
    return ApiError(404, f"no adapter or model is named `{shown}`", code="model_not_found", param="model")
