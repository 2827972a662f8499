"""What the kernel benchmark measures: shapes of models, named points, and what each must move and compute. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from bench.job import zipf_counts

ITEMSIZE = 2
"""Bytes of bfloat16, in which everything is measured."""

DECODE_ROWS = 512
"""Rows up to which a batch is called decode; its bound is the memory's bandwidth."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Sibling projections that read one input of size `k`; the widths of their outputs stand side by side."""

    name: str
    k: int
    widths: tuple[int, ...]


def _decoder(hidden: int, queries: int, key_values: int, intermediate: int) -> tuple[Projection, ...]:
    return (
        Projection("qkv", hidden, (queries, key_values, key_values)),
        Projection("o", queries, (hidden,)),
        Projection("gate_up", hidden, (intermediate, intermediate)),
        Projection("down", intermediate, (hidden,)),
    )


MODELS = {
    "llama-3-8b": _decoder(4096, 4096, 1024, 14336),
    "qwen2.5-7b": _decoder(3584, 3584, 512, 18944),
    "qwen2.5-32b": _decoder(5120, 5120, 1024, 27648),
}
"""The four places of LoRA in a decoder layer, from the models' published configurations."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: a projection of a model, and the batch that goes through it."""

    model: str
    projection: Projection
    rows: int
    rank: int
    adapters: int
    popularity: str
    """uniform or zipf."""

    @property
    def name(self) -> str:
        many = f"{self.adapters} {self.popularity}" if self.adapters > 1 else "1"
        return f"{self.model} {self.projection.name}, {self.rows} rows, {many}, rank {self.rank}"

    @property
    def decode(self) -> bool:
        return self.rows <= DECODE_ROWS

    def counts(self) -> list[int]:
        """Rows of each adapter, most popular first; 0 for those that the batch has no row for."""
        return zipf_counts(self.rows, self.adapters, 1.0 if self.popularity == "zipf" else 0.0)

    def bytes(self) -> int:
        """The fewest bytes to move: x once, y read and written, A and B of each adapter present once."""
        k, n = self.projection.k, sum(self.projection.widths)
        present = sum(count > 0 for count in self.counts())
        weights = present * self.rank * (len(self.projection.widths) * k + n)
        return ITEMSIZE * (self.rows * (k + 2 * n) + weights)

    def flops(self) -> int:
        """Floating-point operations, an addition and a multiplication counted as two."""
        k, n = self.projection.k, sum(self.projection.widths)
        return 2 * self.rows * self.rank * (len(self.projection.widths) * k + n)


def points() -> list[Point]:
    """Every point, the ones that targets are about first: what time runs out for is at the end."""
    made: dict[str, Point] = {}
    for point in _points():
        made.setdefault(point.name, point)
    return list(made.values())


def _points() -> Iterator[Point]:
    llama = {projection.name: projection for projection in MODELS["llama-3-8b"]}
    for rows, projection in product((256, 64, 512), llama.values()):
        yield Point("llama-3-8b", projection, rows, 16, 32, "zipf")
    for rank, projection in product((64, 128), llama.values()):
        yield Point("llama-3-8b", projection, 8192, rank, 8, "uniform")
    for rows in (1, 8, 32, 128, 2048):
        yield Point("llama-3-8b", llama["qkv"], rows, 16, 32, "zipf")
    for rank, name in product((8, 64, 128), ("qkv", "down")):
        yield Point("llama-3-8b", llama[name], 256, rank, 32, "zipf")
    for adapters, popularity in product((1, 8, 256), ("uniform", "zipf")):
        yield Point("llama-3-8b", llama["qkv"], 256, 16, adapters, popularity if adapters > 1 else "uniform")
    for model, rows in product(("qwen2.5-32b", "qwen2.5-7b"), (256, 8192)):
        for projection in MODELS[model]:
            adapters, rank, popularity = (32, 16, "zipf") if rows <= DECODE_ROWS else (8, 64, "uniform")
            yield Point(model, projection, rows, rank, adapters, popularity)
    for rows in (1024, 4096):
        yield Point("llama-3-8b", llama["gate_up"], rows, 64, 8, "zipf")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reached in the same run: bytes copied (read and written) and bf16 operations, a second."""

    copy: float
    gemm: float


def percents(point: Point, seconds: float, ceilings: Ceilings) -> dict[str, float | str]:
    """How near a time comes to what bounds the point, and to each of the two ceilings, in percent."""
    copy = point.bytes() / ceilings.copy / seconds * 100
    gemm = point.flops() / ceilings.gemm / seconds * 100
    return {"bound": "copy" if copy >= gemm else "gemm", "of_bound": max(copy, gemm), "of_copy": copy, "of_gemm": gemm}


def sets_of(bytes_of_one: int, cache_bytes: int) -> int:
    """Sets of operands to walk through so that none is in the cache when its turn comes again: four caches full."""
    return max(1, min(256, -(-4 * cache_bytes // bytes_of_one)))
