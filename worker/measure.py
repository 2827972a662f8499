"""What passes cost here: a few of them, timed before a job starts."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from loramill.worker.engine import Engine
from loramill.worker.request import Mix, Request, Sampling, plain

PROMPT_TOKENS = 256
"""Of a timed prefill, over as many rows as can run."""
DECODES = 2
_SMALL = 4  # the fraction of the rows at which both are timed a second time


@dataclass(slots=True, frozen=True)
class PassTime:
    """One pass of `tokens` prompt tokens or of `rows` decoding rows, over `adapters` adapters."""

    seconds: float
    tokens: int
    rows: int
    adapters: int


@dataclass(slots=True)
class Measured:
    """Seconds of passes; of merging an adapter, of putting one into a slot, of reading one."""

    passes: list[PassTime] = field(default_factory=list)
    merge_s: float = 0.0
    load_s: float = 0.0
    read_s: float = 0.0


def tokens_to_measure(max_num_seqs: int) -> int:
    """About how many tokens `measure` computes."""
    rows = max_num_seqs + max(1, max_num_seqs // _SMALL)
    return 3 * rows * (max(1, PROMPT_TOKENS // max_num_seqs) + DECODES)


def measure(engine: Engine, adapters: Sequence[str]) -> Measured:
    """Time prefill and decode at two sizes without adapters, with one and with as many as there are slots, and a merge.

    `adapters` (content hashes) are those of the job that can be served both ways, the most used first. The engine must
    be idle; its counters start anew.
    """
    measured = Measured()
    most, few = engine.max_num_seqs, max(1, engine.max_num_seqs // _SMALL)
    slots = engine.config.max_loras_per_batch - len(engine.config.pinned.difference(adapters))
    many = [plain(adapter) for adapter in adapters[:slots]]
    one = many[:1]
    _time(engine, Measured(), few, [()])  # the first passes fault memory in
    sizes: list[tuple[int, Sequence[Mix]]] = [(most, [()]), (few, [()])]
    sizes += [(most, one), (few, one)] * bool(one) + [(most, many)] * (len(many) > 1)
    for rows, mixes in sizes:
        _time(engine, measured, rows, mixes)
    stats = engine.stats
    measured.load_s = (stats.adapter_load_s - stats.host.waited_s) / max(1, stats.adapter_loads)
    measured.read_s = stats.host.read_s / max(1, stats.host.loads)
    if one:
        _time(engine, Measured(), 1, one, merged=True)
        measured.merge_s = engine.stats.merge_s
        _time(engine, Measured(), 1, [()])  # the base's own weights again
    engine.reset_stats()
    return measured


def _time(engine: Engine, measured: Measured, rows: int, mixes: Sequence[Mix], *, merged: bool = False) -> None:
    longest = engine.config.max_row_tokens or engine.config.base.max_model_len
    answer = min(DECODES + 1, longest - 1)
    size = max(1, min(PROMPT_TOKENS // engine.max_num_seqs, longest - answer))
    draw = random.Random()
    for row in range(rows):
        # No two alike, nor like those of an earlier time: what they have in common would be computed once.
        prompt = draw.choices(range(engine.config.base.vocab_size), k=size)
        # The rows of a mix side by side, as in a planned job.
        mix = mixes[row * len(mixes) // rows]
        engine.add(Request(-1 - row, prompt, Sampling(answer, temperature=0, ignore_eos=True), mix, merged))
    with engine.one_at_a_time():
        _passes(engine, measured, len(set(mixes) - {()}))


def _passes(engine: Engine, measured: Measured, adapters: int) -> None:
    while engine.has_work:
        running, before, loading_s = engine.num_running, engine.stats.prompt_tokens, engine.stats.adapter_load_s
        began_s = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - began_s - (engine.stats.adapter_load_s - loading_s)
        tokens = engine.stats.prompt_tokens - before
        if not tokens or not running:  # one kind alone: in a small cache not all rows run at once
            measured.passes.append(PassTime(seconds, tokens, 0 if tokens else running, adapters))
