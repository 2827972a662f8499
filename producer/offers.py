"""What workers serve, from the manifests that they published: names and tokenizers for a job's rows, and who could run
them. No model is opened."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.producer.job_plan import AdapterFacts
from loramill.producer.tokenizer_cache import Blob, tokenizer_folder
from loramill.schemas.errors import did_you_mean
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.manifest import AdapterOffer, Manifest
from loramill.schemas.names import Named, Names
from loramill.schemas.prompt import Limits, Prompter
from loramill.store.records import WorkerRecord
from loramill.worker.tokenizers import Tokenizers

_SHOWN = 8


@dataclass(slots=True, frozen=True)
class Offer:
    """What rows of a job can ask of the workers of one base, all of them together."""

    base_id: str
    names: Names
    prompter: Prompter
    """The base's."""
    keys: Mapping[str, str]
    """Of each adapter's name."""
    facts: Mapping[str, AdapterFacts]
    """By content hash."""
    max_mix: int
    """The most adapters that some worker takes in one row."""
    max_loras: int
    """The most adapters that every worker takes in one shard."""
    warnings: tuple[str, ...]

    def name_of(self, key: str) -> str:
        """What people call the adapter of a key."""
        return next((name for name, one in self.keys.items() if one == key), key[:12])


def choose(manifests: Sequence[Manifest], workers: Iterable[WorkerRecord], base: str | None) -> list[Manifest]:
    """Those of one base, the latest published first, as `manifests` are: of the base that is called `base`, or of the
    only one. Of several of that name (the model changed) the one that workers serve now, else the latest.

    Raises Failure: INPUT if there is none, USAGE if it takes a name to tell.
    """
    known = dict.fromkeys(manifest.base for manifest in manifests)
    if base is not None and base not in known:
        raise Failure(
            ExitCode.INPUT, f"--base {base}: no worker has served it; there is {', '.join(known)}"
            + did_you_mean(base, known),
        )  # fmt: skip
    named = [manifest for manifest in manifests if base in (None, manifest.base)]
    running = {worker.base_id for worker in workers}
    serving = [manifest for manifest in named if manifest.base_id in running] or named
    if base is None and len({manifest.base for manifest in serving}) > 1:
        names = ", ".join(dict.fromkeys(manifest.base for manifest in serving))
        raise Failure(ExitCode.USAGE, f"workers serve several bases ({names}): say which with --base NAME")
    return of_base(serving[0], manifests)


def of_base(first: Manifest, manifests: Sequence[Manifest]) -> list[Manifest]:
    """`first`, and the others of its base."""
    return [first, *(one for one in manifests if one.base_id == first.base_id and one.id != first.id)]


@dataclass(slots=True, frozen=True)
class Together:
    """What several manifests name. Where they differ, the one that was published last counts."""

    adapters: dict[str, AdapterOffer]
    aliases: dict[str, Mapping[str, float]]
    routes: dict[str, Mapping[str, str]]
    differing: dict[str, str]
    """Names that workers mean different things by -> what kind of name."""


def together(manifests: Sequence[Manifest]) -> Together:
    """`manifests`: of one base, the latest published first."""
    all_ = Together({}, {}, {}, {})
    for manifest in manifests:
        offered = {offer.name: offer for offer in manifest.adapters}
        for name in [*offered, *manifest.aliases]:
            mine, known = offered.get(name), all_.adapters.get(name)
            if name not in all_.adapters and name not in all_.aliases:
                if mine:
                    all_.adapters[name] = mine
                else:
                    all_.aliases[name] = manifest.aliases[name]
            elif (mine and (mine.key, mine.scale)) != (known and (known.key, known.scale)) or (
                not mine and all_.aliases.get(name) != manifest.aliases[name]
            ):
                all_.differing[name] = "adapter" if known else "alias"
        for name, route in manifest.routes.items():
            if all_.routes.setdefault(name, route) != route:
                all_.differing[name] = "route"
    return all_


def open_offer(
    manifests: Sequence[Manifest],
    workers: Iterable[WorkerRecord],
    blob: Blob,
    cache: Path | None = None,
    *,
    unwanted: Collection[str] = (),
) -> Offer:
    """What `choose` chose, with its tokenizers opened; no row may name what is `unwanted`. Raises Failure,
    StoreError."""
    latest, all_ = manifests[0], together(manifests)
    limits = Limits(latest.max_model_len, latest.vocab_size)

    def folder(of: Manifest, tokenizer: str) -> Path:
        return tokenizer_folder(of.tokenizers[tokenizer], blob, cache)

    tokenizers = Tokenizers(folder(latest, latest.tokenizer), limits, latest.chat_template)
    of_key = {offer.key: manifest for manifest in manifests for offer in manifest.adapters}

    def named(offer: AdapterOffer) -> Named:
        if offer.name in unwanted:
            return Named("", unusable="an operator has unloaded it")
        prompter = None
        if offer.tokenizer is not None and offer.vocab_size is not None:
            try:
                prompter = tokenizers.own(folder(of_key[offer.key], offer.tokenizer), offer.vocab_size)
            except ValueError as error:
                raise Failure(ExitCode.INPUT, f"adapter `{offer.name}`: {error}") from error
        return Named(offer.sha256, offer.scale, offer.template, offer.alone, prompter=prompter)

    adapters = {name: named(offer) for name, offer in all_.adapters.items()}
    ids = {worker.manifest for worker in workers}
    current = [manifest for manifest in manifests if manifest.id in ids] or manifests
    slots = [manifest.max_loras for manifest in manifests if manifest.id in ids] or [latest.max_loras]
    return Offer(
        latest.base_id,
        Names(latest.base, adapters, all_.aliases, all_.routes),
        tokenizers.base,
        {name: offer.key for name, offer in all_.adapters.items()},
        {offer.sha256: AdapterFacts(offer.rank, offer.alone is not None) for offer in all_.adapters.values()},
        max(slots),
        min(slots),
        tuple(
            f"{kind} `{name}`: workers mean different things by it; what was published last counts"
            # Of what nobody serves any more (an adapter was replaced) there is nothing to say.
            for name, kind in together(current).differing.items()
        ),
    )


@dataclass(slots=True, frozen=True)
class Able:
    """Which of the running workers could run a job."""

    all_of_it: tuple[str, ...]
    """Their ids."""
    part_of_it: tuple[str, ...]
    lacking: tuple[str, ...]
    """Keys of adapters that none of them serves."""
    running: int
    """Workers, of whatever base."""

    def in_words(self, name_of: Mapping[str, str]) -> str:
        """One line; `name_of` has the names of keys."""
        lacking = [f"`{name_of.get(key, key[:12])}`" for key in self.lacking]
        without = f"; none serves {_some(lacking)}" if lacking else ""
        if self.all_of_it:
            return f"{_workers(len(self.all_of_it))} could run all of it: {_some(self.all_of_it)}"
        if self.part_of_it:
            return f"{_workers(len(self.part_of_it))} could run part of it: {_some(self.part_of_it)}{without}"
        if self.running:
            return f"none of {_workers(self.running)} that are running could run it yet{without}"
        return "no worker is running yet that could run it"

    def as_data(self, name_of: Mapping[str, str]) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "all": list(self.all_of_it),
            "part": list(self.part_of_it),
            "lacking": [name_of.get(key, key) for key in self.lacking],
            "running": self.running,
        }


def able(
    manifests: Iterable[Manifest],
    workers: Collection[WorkerRecord],
    shards: Iterable[tuple[str, ...]],
    base_id: str,
) -> Able:
    """Who could run the shards of a job: `shards` has the keys of the adapters of each (or of each kind of them).
    A worker that is draining takes nothing more."""
    kinds = {frozenset(shard) for shard in shards}
    by_id = {manifest.id: manifest for manifest in manifests}
    every: list[str] = []
    some: list[str] = []
    served = set[str]()
    for worker in workers:
        manifest = by_id.get(worker.manifest)
        if manifest is None or manifest.base_id != base_id or worker.state == "draining":
            continue
        keys = {offer.key for offer in manifest.adapters}
        served |= keys
        can = [kind <= keys and len(kind) <= manifest.max_loras for kind in kinds]
        if any(can):
            (every if all(can) else some).append(worker.id)
    lacking = frozenset[str]().union(*kinds) - served
    return Able(tuple(every), tuple(some), tuple(sorted(lacking)), len(workers))


def _workers(count: int) -> str:
    return f"{count:,} worker" + ("s" if count > 1 else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])
