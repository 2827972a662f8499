"""The engine: schedule, load adapters, one forward pass, draw, emit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from loramill.kernels.router import Router
from loramill.worker.adapters import Adapter
from loramill.worker.answers import Answers
from loramill.worker.batch import pack
from loramill.worker.cache import KVCache
from loramill.worker.cache_size import make_room
from loramill.worker.config import EngineConfig as EngineConfig
from loramill.worker.forecast import Forecast
from loramill.worker.memory import give_back, keep_freed_memory, ran_out
from loramill.worker.model import Model, ModelError
from loramill.worker.pressure import ATTEMPTS, Pressure
from loramill.worker.request import EngineStats, Mix, Request, Result, Sampling
from loramill.worker.residency import Residency
from loramill.worker.sampling import Draw, draw
from loramill.worker.scheduler import Scheduler
from loramill.worker.sequence import Chunk, Sequence, Step

_MAX_SEQS = {"cpu": 128, "cuda": 256}


class Engine:
    """Answers rows with one base model and many adapters, as many at once as memory and limits allow."""

    def __init__(self, config: EngineConfig, adapters: Iterable[Adapter] = ()) -> None:
        """Load the base model; adapters are read when a row needs them.

        Raises:
            ModelError: the model cannot be loaded or served, or the cache memory holds no row.
        """
        self.config = config
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelError("--device cuda: torch sees no CUDA device here")
        if self.device == "cpu":
            keep_freed_memory()  # also what loading frees: weights as they were before they were packed
        self._model = Model(config.base, config.dtype, self.device, config.max_loras_per_batch)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        wanted = config.max_num_seqs or _MAX_SEQS[self.device]
        self.max_num_seqs = min(wanted, config.max_num_batched_tokens)
        adapters = list(adapters)
        room = make_room(config, self._model, self.max_num_seqs, self._to_merge(adapters))
        pool = room.pool
        # On a device one page more, for the rows that pad a graph.
        pages = len(pool) + (self.device == "cuda")
        self._cache = KVCache(self._model.shapes, pages, pool.size, self._model.dtype, self._model.device)
        self._stats = EngineStats()
        self._residency = Residency(self._model, config, self._stats)
        self._scheduler = Scheduler(
            self._residency.slots,
            room,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._pressure = Pressure(self.max_num_seqs, config.max_num_batched_tokens)
        self._router = Router(config.max_loras_per_batch, self._model.device)
        if self.device == "cuda":
            pages_per_row = room.tables.shape[1]
            self._model.use_graphs(self._cache, self._router, self.max_num_seqs, pages_per_row, scratch_page=len(pool))
        self._answers = Answers(config.base.eos_token_ids)
        for adapter in adapters:
            self.register(adapter)

    def add(self, request: Request) -> None:
        """Queue a row.

        Raises:
            ValueError: its mix cannot be had (AdapterUnavailable if it could), its prompt is empty, it is too long, its
                key is in use, or it has stop strings and no `decode`.
        """
        longest = len(request.prompt) + request.sampling.max_tokens
        limit = self.config.max_row_tokens or self.config.base.max_model_len
        self._residency.check(request.mix, merged=request.merged)
        if not request.prompt or request.sampling.max_tokens < 1 or longest > limit:
            raise ValueError(f"prompt and max_tokens must be at least 1 and together at most {limit}, not {longest}")
        self._answers.open(request)
        for index in range(request.sampling.n):
            self._scheduler.add(Sequence(request, index, list(request.prompt)))

    @torch.inference_mode()
    def step(self, on_start: Callable[[Several[int]], None] | None = None) -> list[Result]:
        """Run one forward pass; the rows that it finished. Nothing to do is an empty list.

        `on_start` is told the keys of rows of which an answer is begun in this pass, before anything is done for them:
        of those that start over as well.
        """
        return self._pass(on_start)[0]

    @torch.inference_mode()
    def next_logits(self, prompt: list[int], mix: Mix = (), *, merged: bool = False) -> Tensor:
        """What the model says follows `prompt`: [vocab] float32. For an engine without rows.

        Raises:
            ValueError: as for `add`; or the mix could not be had.
        """
        if self.has_work:
            raise ValueError("next_logits needs an engine without work")
        self.add(Request(-1, prompt, Sampling(1, temperature=0), mix, merged))
        while True:
            results, logits = self._pass()
            if results:
                break
        if logits is None:
            raise ValueError(results[0].error)
        return logits[0].to(torch.float32, copy=True)  # a graph's next pass writes over them

    def _pass(self, on_start: Callable[[Several[int]], None] | None = None) -> tuple[list[Result], Tensor | None]:
        """One pass: the rows that it finished, and the logits [O, vocab] of those that got a token."""
        scheduler = self._scheduler
        began_s = time.perf_counter()
        step = scheduler.schedule()
        if on_start is not None and (begun := [c.sequence.request.key for c in step.chunks if c.begins]):
            on_start(begun)
        failed: list[Result] = []
        try:
            failed = self._fail_rows_of(self._residency.prepare(step, scheduler))
            chunks = [chunk for chunk in step.chunks if chunk.sequence.pages] if failed else step.chunks
            if not chunks:
                return failed, None
            sampled = [chunk.sequence for chunk in chunks if chunk.samples]
            batch = pack(chunks, scheduler.room.tables, self._cache, self._router, self._model.device)
            logits = self._model.forward(batch)
            draws = draw(logits, sampled) if sampled else []
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error) or not scheduler.running:
                raise
            why = str(error)
        else:
            for chunk in chunks:
                chunk.sequence.computed += chunk.size
            self._count(chunks, time.perf_counter() - began_s)
            self._pressure.went_well()
            self._limit()
            return failed + self._emit(sampled, draws), logits
        # Only here is the error gone, and with it its frames' hold on what the pass had computed.
        return failed + self._make_smaller(step, why), None

    def register(self, adapter: Adapter) -> None:
        """Rows may ask for this adapter from now on; the same content again changes nothing.

        Raises:
            ValueError: it is larger than the host memory for adapters.
        """
        self._residency.register(adapter)

    def forget(self, sha256: str) -> None:
        """Let an adapter go.

        Raises:
            ValueError: rows that are waiting or running ask for it.
        """
        using = {s.request.key for s in (*self._scheduler.waiting, *self._scheduler.running) if s.asks_for(sha256)}
        if using:
            raise ValueError(f"adapter {sha256} is in use by rows that are not finished: {len(using)} of them")
        self._residency.forget(sha256)

    def watch(self, forecast: Forecast) -> None:
        """Take account of rows to come, until `unwatch`."""
        self._residency.watch(forecast)

    def unwatch(self, forecast: Forecast) -> None:
        """The rows of a forecast have come, or will not."""
        self._residency.unwatch(forecast)

    def preload(self) -> None:
        """Read adapters into host memory, as many as it holds, the pinned ones first.

        Raises:
            AdapterError: one is no longer what it was when it was checked.
        """
        self._residency.preload()

    def close(self) -> None:
        """End the thread that reads adapters."""
        self._residency.close()

    def cancel_waiting(self) -> list[int]:
        """Drop the rows that have not started; their keys."""
        keys = sorted({sequence.request.key for sequence in self._scheduler.cancel_waiting()})
        for key in keys:
            self._answers.drop(key)
        return keys

    def cancel(self, keys: Collection[int]) -> None:
        """Drop these rows, running or not; their keys may be used again."""
        self._scheduler.cancel(set(keys))
        for key in keys:
            self._answers.drop(key)

    @property
    def num_waiting(self) -> int:
        """Answers not started (a row of n counts n times)."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Answers in the making."""
        return len(self._scheduler.running)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def resident(self) -> list[str]:
        """Content hashes of the adapters whose rows need no load: those in slots, and those that are merged."""
        return sorted(self._scheduler.slots.resident.union(adapter for adapter, _ in self._scheduler.weights))

    @property
    def stats(self) -> EngineStats:
        """Counters so far."""
        self._stats.preemptions = self._scheduler.preemptions
        self._stats.running = len(self._scheduler.running)
        self._stats.places = self.max_num_seqs
        self._stats.resident = len(self._scheduler.slots.resident)
        room = self._scheduler.room
        self._stats.kv_used, self._stats.kv_tokens = room.used, room.tokens
        return self._stats

    def reset_stats(self) -> None:
        """Count from zero again."""
        self._stats = EngineStats()
        self._residency.count_in(self._stats)

    def _make_smaller(self, step: Step, why: str) -> list[Result]:
        """The pass ran out of memory: its rows start over in smaller ones; one that is too much by itself fails."""
        scheduler = self._scheduler
        keys = [sequence.request.key for sequence in scheduler.running]
        given_up = self._pressure.ran_out(keys, sum(chunk.size for chunk in step.chunks))
        self._stats.out_of_memory += 1
        scheduler.start_over(step.loads)
        self._limit()
        give_back(self.device)
        if given_up is None:
            return []
        short = f"out of memory with nothing beside it, {ATTEMPTS} times: {' '.join(why.split())[:200]}"
        return self._fail({given_up: (scheduler.waiting.of_row(given_up)[0].request, short)}, "out_of_memory")

    def _limit(self) -> None:
        pressure, scheduler = self._pressure, self._scheduler
        self.max_num_seqs = scheduler.max_num_seqs = pressure.max_num_seqs
        scheduler.max_num_batched_tokens = pressure.max_num_batched_tokens

    def _count(self, chunks: list[Chunk], seconds: float) -> None:
        self._stats.waves += not self._stats.steps and not self._stats.waves
        self._stats.stepped(seconds, len(chunks), self.max_num_seqs)
        for chunk in chunks:
            sequence, start, size, _ = chunk
            self._stats.prompt_tokens += max(0, min(size, len(sequence.request.prompt) - start))
            self._stats.prompt_tokens_shared += sequence.shared if chunk.begins else 0

    def _emit(self, sequences: list[Sequence], draws: list[Draw]) -> list[Result]:
        """Append the drawn tokens; collect the rows all of whose answers are now complete."""
        finished: list[Result] = []
        broken = {s.request.key: s.request for s, (token, _) in zip(sequences, draws, strict=True) if token is None}
        why = "the model's output was not finite (NaN or infinity)"
        finished += self._fail({key: (request, why) for key, request in broken.items()}, "engine_error")
        for sequence, (token, logprob) in zip(sequences, draws, strict=True):
            if token is None or sequence.request.key in broken:
                continue
            self._stats.completion_tokens += 1
            if self._answers.append(sequence, token, logprob):
                self._scheduler.finish(sequence)
                finished.extend(self._answers.collect(sequence.request))
        return finished

    def _fail_rows_of(self, adapters: Mapping[str, str]) -> list[Result]:
        """End every row that asks for an adapter that cannot be had, for which `adapters` says why."""
        rows: dict[int, tuple[Request, str]] = {}
        for sequence in (*self._scheduler.running, *self._scheduler.waiting) if adapters else ():
            why = next((adapters[adapter] for adapter, _ in sequence.request.mix if adapter in adapters), None)
            if why is not None:
                rows[sequence.request.key] = sequence.request, why
        return self._fail(rows, "adapter_unavailable")

    def _fail(self, rows: Mapping[int, tuple[Request, str]], code: str) -> list[Result]:
        """End rows with an error, all of their answers, and why."""
        if rows:
            self._scheduler.cancel(rows, failed=True)
        for key in rows:
            self._answers.drop(key)
        return [Result(key, len(one.prompt), [], error=why, code=code) for key, (one, why) in rows.items()]

    def _to_merge(self, adapters: Iterable[Adapter]) -> int:
        """Bytes to keep for weights with one of these adapters merged in."""
        sizes = {(one.parameters, one.vocab_size) for one in adapters if one.static_only or self.config.merging}
        return max((self._model.merge_bytes(*size) for size in sizes), default=0)
