"""The engine: schedule, load adapters, one forward pass, draw, emit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager

import torch
from torch import Tensor

from loramill.kernels.router import Router
from loramill.worker.adapters import Adapter
from loramill.worker.answers import Answers
from loramill.worker.cache import KVCache
from loramill.worker.cache_size import make_room
from loramill.worker.config import EngineConfig as EngineConfig
from loramill.worker.endings import Endings
from loramill.worker.flight import Flights
from loramill.worker.forecast import Forecast
from loramill.worker.memory import give_back, keep_few_products, keep_freed_memory, ran_out
from loramill.worker.model import Model, ModelError
from loramill.worker.pressure import ATTEMPTS, Pressure
from loramill.worker.request import EngineStats, Mix, Request, Result, Sampling
from loramill.worker.residency import Residency
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
            keep_few_products()
            keep_freed_memory()  # also what loading frees: weights as they were before they were packed
        self._model = Model(config.base, config.dtype, self.device, config.max_loras_per_batch)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        wanted = config.max_num_seqs or _MAX_SEQS[self.device]
        self.max_num_seqs = min(wanted, config.max_num_batched_tokens)
        adapters = list(adapters)
        room = make_room(config, self._model, self.max_num_seqs, self._for_adapters(adapters))
        pool = room.pool
        # On a device one page more, for the rows that pad a graph.
        pages = len(pool) + (self.device == "cuda")
        cache = KVCache(self._model.shapes, pages, pool.size, self._model.dtype, self._model.device)
        self._stats = EngineStats()
        self._residency = Residency(self._model, config, self._stats)
        self._scheduler = Scheduler(
            self._residency.slots,
            room,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._pressure = Pressure(self.max_num_seqs, config.max_num_batched_tokens)
        router = Router(config.max_loras_per_batch, self._model.device)
        if self.device == "cuda":
            pages_per_row = room.tables.shape[1]
            self._model.use_graphs(cache, router, self.max_num_seqs, pages_per_row, scratch_page=len(pool))
        self._answers = Answers(config.base.eos_token_ids)
        self._endings = Endings(self._scheduler, self._answers)
        overlap = self.device == "cuda" if config.overlap is None else config.overlap
        self._flights = Flights(self._model, cache, router, room, overlap=overlap)
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
        """Run one forward pass; the rows that it finished, or where passes overlap those that the one before it did.
        Nothing to do is an empty list.

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
        with self.one_at_a_time():
            while True:
                results, logits = self._pass()
                if results:
                    break
        if logits is None:
            raise ValueError(results[0].error)
        return logits[0].to(torch.float32, copy=True)  # a graph's next pass writes over them

    def _pass(self, on_start: Callable[[Several[int]], None] | None = None) -> tuple[list[Result], Tensor | None]:
        """Launch a pass, then settle the one before it, or this one as well where no two may overlap: the rows that are
        finished, and the logits [O, vocab] of those that the launched pass draws a token for."""
        scheduler, results = self._scheduler, list[Result]()
        if not self._flights.can_be_followed:
            results += self._settle()
        step = scheduler.schedule()
        if on_start is not None and (begun := [c.sequence.request.key for c in step.chunks if c.begins]):
            on_start(begun)
        try:
            failed, logits = self._launch(step)
            results += failed
            results += self._settle(int(self._flights.overlap and logits is not None))
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error) or not scheduler.running:
                raise
            why = str(error)
        else:
            return results, logits
        # Only here is the error gone, and with it its frames' hold on what the pass had computed.
        return results + self._make_smaller(step, why), None

    def _launch(self, step: Step) -> tuple[list[Result], Tensor | None]:
        """The rows that cannot be computed, and the logits of the pass, if there is one for the others."""
        failed = self._endings.fail_rows_of(self._residency.prepare(step, self._scheduler))
        chunks = [chunk for chunk in step.chunks if chunk.sequence.pages] if failed else step.chunks
        if not chunks:
            return failed, None
        self._count(chunks)
        return failed, self._flights.launch(chunks)

    def _settle(self, left: int = 0) -> list[Result]:
        """Wait for passes, until so many are under way: the rows that they finished."""
        results: list[Result] = []
        for flight, seconds, drawn in self._flights.settle(left):
            self._stats.stepped(seconds, len(flight.chunks), self.max_num_seqs)
            self._pressure.went_well()
            self._limit()
            results += self._endings.take(drawn, self._stats)
        return results

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Within this block `step` says all of the pass that it runs: no two overlap."""
        overlap, self._flights.overlap = self._flights.overlap, False
        try:
            yield
        finally:
            self._flights.overlap = overlap

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
        self._flights.abandon()
        scheduler.start_over(step.loads)
        self._limit()
        give_back(self.device)
        if given_up is None:
            return []
        short = f"out of memory with nothing beside it, {ATTEMPTS} times: {' '.join(why.split())[:200]}"
        return self._endings.fail({given_up: (scheduler.waiting.of_row(given_up)[0].request, short)}, "out_of_memory")

    def _limit(self) -> None:
        pressure, scheduler = self._pressure, self._scheduler
        self.max_num_seqs = scheduler.max_num_seqs = pressure.max_num_seqs
        scheduler.max_num_batched_tokens = pressure.max_num_batched_tokens

    def _count(self, chunks: Several[Chunk]) -> None:
        self._stats.waves += not self._stats.waves
        for chunk in chunks:
            sequence, start, size, _ = chunk
            self._stats.prompt_tokens += max(0, min(size, len(sequence.request.prompt) - start))
            self._stats.prompt_tokens_shared += sequence.shared if chunk.begins else 0

    def _for_adapters(self, adapters: Iterable[Adapter]) -> int:
        """Bytes to keep for slots that hold these adapters, and for weights with one of them merged in."""
        sizes: set[tuple[frozenset[str], int]] = set()
        ranks: dict[str, int] = {}
        for one in adapters:
            if one.static_only or self.config.merging:
                sizes.add((one.parameters, one.vocab_size))
            for module, target in () if one.static_only else one.targets.items():
                ranks[module] = max(target.rank, ranks.get(module, 0))
        merged = max((self._model.merge_bytes(*size) for size in sizes), default=0)
        return merged + self._model.slot_bytes(ranks)
