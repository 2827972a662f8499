"""What goes into the engine and what comes out: plain slotted data, no tokenizer, no schema."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(slots=True, frozen=True)
class Sampling:
    """How the tokens of one row are chosen. Every field has its final value: defaults are resolved before."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in CTRL (1909.05858)."""
    presence_penalty: float = 0.0
    """Over the output only."""
    frequency_penalty: float = 0.0
    """Over the output only."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    """Unsigned 64 bits; a row's draws depend on it, the sample's index and the position, and on nothing else."""
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report beside each chosen token; None reports nothing."""


Mix = tuple[tuple[str, float], ...]
"""What a row is answered by: the content hashes of adapters, each once, with the strength of each. () is the base."""


def plain(adapter: str | None) -> Mix:
    """One adapter as it was trained, or the base."""
    return () if adapter is None else ((adapter, 1.0),)


@dataclass(slots=True, frozen=True)
class Request:
    """One row: `prompt` (token ids, at least one) answered `sampling.n` times by `mix`."""

    key: int
    """The row's number; the result carries it back."""
    prompt: list[int]
    sampling: Sampling
    mix: Mix = ()
    """Of registered adapters."""
    merged: bool = False
    """Static: computed while the base's weights are those with the mix merged in. Dynamic otherwise."""
    decode: Callable[[list[int]], str] | None = None
    """Token ids to text, which finds stop strings: tokens are what the mix's vocabulary says."""
    urgent: bool = False
    """Somebody waits for it: it starts before the rows that wait, and they do not wait for it for ever."""
    follow: Follow | None = None
    """Told of every token that does not end its answer, as it is drawn: the answer's index, the token, its logprob."""


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """Natural-log probability of a chosen token under the model's raw distribution, and its best alternatives."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, logprob), best first; as many as asked for."""


Follow = Callable[[int, int, TokenLogprob | None], None]


@dataclass(slots=True)
class Completion:
    """One of a row's `n` answers."""

    index: int
    token_ids: list[int]
    """Everything generated, the end-of-sequence token included."""
    finish_reason: FinishReason
    stop_string: str | None = None
    """The stop string that ended it: the text is cut where it first appears."""
    logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class Result:
    """A finished row: `completions` in index order, or an `error` and none."""

    key: int
    prompt_tokens: int
    completions: list[Completion]
    error: str | None = None
    code: str = "engine_error"
    """What kind of error: engine_error, adapter_unavailable, or out_of_memory."""


class AdapterUnavailable(ValueError):
    """An adapter that was checked and cannot be had any more: its files changed, or are gone."""


@dataclass(slots=True)
class HostStats:
    """Counters of the adapters in host memory."""

    loads: int = 0
    """Adapters read from disk."""
    hits: int = 0
    """Adapters that were there when a slot asked for one."""
    evictions: int = 0
    bytes_read: int = 0
    """As they are packed."""
    read_s: float = 0.0
    """Reading, checking and packing, most of it beside the computing."""
    waited_s: float = 0.0
    """How long slots waited for it."""
    most_bytes: int = 0
    """The most held at once."""


STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Of StepTimes. A decode step takes milliseconds to tenths, a long prefill on a CPU seconds."""


@dataclass(slots=True)
class StepTimes:
    """How long passes took. Counting a pass, all in all, takes 0.4 us."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_BOUNDS_S) + 1))
    """Passes of at most each of STEP_BOUNDS_S and more than the one before it; at the end the longer ones."""
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """One more pass."""
        self.counts[bisect_left(STEP_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made."""

    prompt_tokens: int = 0
    """That were computed."""
    prompt_tokens_shared: int = 0
    """That rows found computed by another, when they started."""
    completion_tokens: int = 0
    steps: int = 0
    step_times: StepTimes = field(default_factory=StepTimes)
    batch_rows: int = 0
    """Sequences in passes, summed up over passes."""
    batch_places: int = 0
    """The most that there could have been in them."""
    adapter_loads: int = 0
    """Into device slots."""
    adapter_evictions: int = 0
    adapter_load_s: float = 0.0
    """How long passes waited for adapters to be in their slots."""
    merges: int = 0
    """Times that the base's weights were made those with a mix merged in."""
    merge_s: float = 0.0
    waves: int = 0
    """Distinct sets of resident adapters, and of merged weights, that the run went through."""
    host: HostStats = field(default_factory=HostStats)
    preemptions: int = 0
    out_of_memory: int = 0
    """Passes that ran out of memory and were made again with less in them."""
    running: int = 0
    """Now, as are those that follow."""
    places: int = 0
    """Of sequences: the most that run at once."""
    resident: int = 0
    kv_used: int = 0
    """Tokens of the cache in pages that sequences have."""
    kv_tokens: int = 0
    """Tokens of the cache."""

    def stepped(self, seconds: float, rows: int, places: int) -> None:
        """One more pass, with so many sequences where there are `places`."""
        self.steps += 1
        self.step_times.add(seconds)
        self.batch_rows += rows
        self.batch_places += places
