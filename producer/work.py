"""How much each mix of a job asks for, and what mixes that share their passes come to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loramill.producer.waves import Limits, MixFacts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class Work:
    """What each mix asks for: (mixes + 1,) each, the base last. Tokens and passes are whole numbers in floats."""

    rows: Ints
    prompt: Floats
    """Tokens."""
    answer: Floats
    """Tokens at most."""
    longest: Floats
    """Tokens of the longest answer."""
    drained: Floats
    """Passes if the mix ran alone, to the last row of each stretch."""
    stretches: Ints
    """Windows of the job in which it has rows: so often would it be merged."""
    windows: int


def measure(mix: NDArray[np.int32], prompt: Ints, answer: Ints, window: Ints, *, mixes: int, max_num_seqs: int) -> Work:
    """What the rows of each mix ask for.

    mix, prompt, answer, window: (rows,); `window` ascends, and the rows of a mix in one window are a stretch.
    """
    place = np.where(mix < 0, mixes, mix).astype(np.int64)
    stretch = window * (mixes + 1) + place
    order = np.lexsort((-answer, stretch))
    answers = answer[order]
    starts = np.flatnonzero(np.diff(stretch[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    before = np.cumsum(answers) - answers
    before -= np.repeat(before[starts], sizes)
    nth = np.arange(len(order)) - np.repeat(starts, sizes)
    # Longest first, a row begins at the latest when those before it are shared out evenly over the batch.
    ends = np.where(nth < max_num_seqs, 0, before / max_num_seqs) + answers
    rounds = np.where(nth % max_num_seqs == 0, answers, 0)
    drained = np.minimum(_each(np.maximum, ends, starts), _each(np.add, rounds, starts))
    of_stretch = place[order][starts]
    longest = np.zeros(mixes + 1)
    np.maximum.at(longest, of_stretch, answers[starts])
    return Work(
        rows=np.bincount(place, minlength=mixes + 1),
        prompt=_sum(place, prompt, mixes + 1),
        answer=_sum(place, answer, mixes + 1),
        longest=longest,
        drained=_sum(of_stretch, drained, mixes + 1),
        stretches=np.bincount(of_stretch, minlength=mixes + 1),
        windows=int(window.max(initial=-1)) + 1,
    )


@dataclass(slots=True, frozen=True)
class Totals:
    """What rows that share their passes come to; an element of each array is one alternative."""

    prompt: Floats
    answer: Floats
    """Tokens."""
    lora_prompt: Floats
    lora_answer: Floats
    """Those of rows with an adapter."""
    held: Floats
    """Passes times slots: for how long each adapter must keep its slot at the least."""
    present: Floats
    """Passes times adapters, where the rows of each get an even share of the batch."""
    loads: Floats
    """Adapters into slots."""
    longest: Floats
    """Tokens of the longest answer."""

    def passes(self, limits: Limits) -> Floats:
        """Forward passes of one engine: rows, tokens, slots or the longest answer bound them."""
        by_rows = self.answer / limits.max_num_seqs
        by_tokens = (self.answer + self.prompt) / limits.max_num_batched_tokens
        by_slots = self.held / max(1, limits.free)
        return np.maximum(np.maximum(by_rows, by_tokens), np.maximum(by_slots, self.longest))


def totals(sums: Floats, longest: Floats) -> Totals:
    """Of sums of `shares`: (7, alternatives), and the longest answer of each alternative."""
    prompt, answer, lora_prompt, lora_answer, held, present, loads = np.maximum(sums, 0)
    return Totals(prompt, answer, lora_prompt, lora_answer, held, present, loads, longest)


def shares(work: Work, facts: Sequence[MixFacts], limits: Limits) -> Floats:
    """(7, mixes + 1): what each mix adds to the fields of `Totals`, but the longest answer, where it is dynamic.

    Mixes of the same adapters hold slots together, each for its share of their answers.
    """
    numbers: dict[frozenset[int], int] = {}
    of = np.array([*(numbers.setdefault(limits.needed(one), len(numbers)) for one in facts), len(numbers)])
    members = np.array([*(len(one) for one in numbers), 0])
    answer, longest, stretches = _sum(of, work.answer, len(members)), np.zeros(len(members)), np.zeros(len(members))
    np.maximum.at(longest, of, work.longest)
    np.maximum.at(stretches, of, work.stretches)
    alone = np.maximum(longest, answer / limits.max_num_seqs) * members
    even = np.maximum(longest, answer * limits.slots / limits.max_num_seqs)
    share = work.answer / np.maximum(1, answer)[of]
    lora = np.r_[np.ones(len(facts)), 0]
    tokens = [work.prompt, work.answer, work.prompt * lora, work.answer * lora]
    return np.array([*tokens, alone[of] * share, even[of] * share * lora, (stretches * members)[of] * share])


def merges(work: Work, facts: Sequence[MixFacts]) -> Floats:
    """(mixes + 1,) adapters merged where a mix is static."""
    return np.array([*(len(one.adapters) for one in facts), 0], float) * work.stretches


def _sum(of: Ints, values: NDArray[np.generic], count: int) -> Floats:
    """(count,) the values of each number."""
    return np.asarray(np.bincount(of, values, count), float)


def _each(function: np.ufunc, values: NDArray[np.generic], starts: Ints) -> Floats:
    """`function` over each stretch of `values`."""
    return np.asarray(function.reduceat(values, starts) if len(starts) else [], float)
