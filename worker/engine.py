"""The engine: schedule, load adapters, one forward pass, draw, emit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loramill.kernels.router import Router
from loramill.worker.adapters import Adapter
from loramill.worker.batch import pack
from loramill.worker.cache import KVCache, bytes_per_token
from loramill.worker.memory import free_memory, keep_freed_memory
from loramill.worker.model import BaseInfo, Model, ModelError
from loramill.worker.request import Completion, EngineStats, FinishReason, Mix, Request, Result, Sampling
from loramill.worker.sampling import Draw, draw
from loramill.worker.scheduler import Scheduler, Sequence, Step
from loramill.worker.slabs import Slabs, size_classes
from loramill.worker.slots import Slots

_MAX_SEQS = {"cpu": 128, "cuda": 256}
_SLAB_TOKENS = {"cpu": 8192, "cuda": 65536}
"""On a CPU about 32 rows of 256 tokens: their keys and values of one layer stay in cache (1.4 ms for 32 rows against
9.5 ms for 128 at once, one core). On a GPU few launches matter more."""
_PROBE_KEY = -1
_MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.85}
"""How much of the memory that is free once the weights are loaded `kv_cache_memory=None` may take."""


@dataclass(slots=True, frozen=True)
class EngineConfig:
    """How one engine runs."""

    base: BaseInfo
    dtype: str = "auto"
    """auto (the checkpoint's), bfloat16, float16 or float32."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    max_loras_per_batch: int = 8
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 8192
    kv_cache_memory: int | None = None
    """Bytes; None takes what the rows can need, within a share of what is free."""
    max_row_tokens: int | None = None
    """The longest row to come, prompt and answer; None is the model's context."""


class Engine:
    """Answers rows with one base model and many adapters, as many at once as memory and limits allow."""

    def __init__(
        self,
        config: EngineConfig,
        adapters: Iterable[Adapter] = (),
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        """Load the base model; adapters are read when a row needs them, and `decode` finds stop strings in the text.

        Raises:
            ModelError: the model cannot be loaded or served, or the cache memory holds no row.
        """
        self.config = config
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelError("--device cuda: torch sees no CUDA device here")
        self._model = Model(config.base, config.dtype, self.device, config.max_loras_per_batch)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        wanted = config.max_num_seqs or _MAX_SEQS[self.device]
        self.max_num_seqs = min(wanted, config.max_num_batched_tokens)
        slabs = self._make_slabs()
        if self.device == "cpu":
            keep_freed_memory()
        self._cache = KVCache(
            self._model.shapes, len(slabs) * slabs.tokens, self._model.dtype, torch.device(self.device)
        )
        self._scheduler = Scheduler(
            Slots(config.max_loras_per_batch),
            slabs,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._router = Router(config.max_loras_per_batch, self._model.device)
        self._adapters = {adapter.sha256: adapter for adapter in adapters}
        self._decode = decode
        self._rows: dict[int, list[Completion]] = {}
        self._eos = frozenset(config.base.eos_token_ids)
        self._stats = EngineStats()

    def register(self, adapter: Adapter) -> None:
        """Let rows ask for this adapter, by its hash."""
        self._adapters[adapter.sha256] = adapter

    def forget(self, sha256: str) -> None:
        """Let go of an adapter.

        Raises:
            ValueError: a row that is waiting or running uses it.
        """
        queued = [*self._scheduler.waiting, *self._scheduler.running]
        if any(sha256 == used for sequence in queued for used, _ in sequence.request.mix):
            raise ValueError(f"adapter {sha256} is in use by rows that are not finished")
        self._adapters.pop(sha256, None)

    def next_logits(self, prompt: list[int], mix: Mix = (), merged: bool = False) -> Tensor:
        """Logits [vocab], float32, of the token that follows `prompt`. For an engine without work.

        Raises:
            ValueError: the engine has work, or as `add`.
        """
        if self.has_work:
            raise ValueError("next_logits needs an engine without work")
        self.add(Request(_PROBE_KEY, prompt, Sampling(1, temperature=0), mix, merged))
        while True:
            _, sampled, logits = self._pass()
            if sampled:
                break
        self._scheduler.finish(sampled[0])
        del self._rows[_PROBE_KEY]
        return logits[0].float()

    def add(self, request: Request) -> None:
        """Queue a row.

        Raises:
            ValueError: its adapter is not registered, its mix cannot be served, its prompt is empty, it is too long,
                or its key is in use.
        """
        longest = len(request.prompt) + request.sampling.max_tokens
        limit = self.config.max_row_tokens or self.config.base.max_model_len
        for adapter, _ in request.mix:
            if adapter not in self._adapters:
                raise ValueError(f"adapter {adapter} is not registered with this engine")
        if request.merged or request.mix[1:] or any(strength != 1 for _, strength in request.mix):
            raise ValueError("this engine serves one adapter a row, dynamically and at strength 1")
        if not request.prompt or request.sampling.max_tokens < 1 or longest > limit:
            raise ValueError(f"prompt and max_tokens must be at least 1 and together at most {limit}, not {longest}")
        if request.key in self._rows:
            raise ValueError(f"row {request.key} is being answered already")
        if request.sampling.stop and self._decode is None:
            raise ValueError("stop strings need the engine to be made with `decode`")
        self._rows[request.key] = []
        for index in range(request.sampling.n):
            self._scheduler.add(Sequence(request, index, list(request.prompt)))

    @torch.inference_mode()
    def step(self) -> list[Result]:
        """Run one forward pass; the rows that it finished. Nothing to do is an empty list."""
        step, sampled, logits = self._pass()
        if step.chunks:
            self._count(step)
        return self._emit(sampled, draw(logits, sampled)) if sampled else []

    @torch.inference_mode()
    def _pass(self) -> tuple[Step, list[Sequence], Tensor]:
        """One forward pass: what it computed, the sequences that reached their end, and their logits [O, vocab]."""
        scheduler = self._scheduler
        step = scheduler.schedule()
        self._cache.carry_out(scheduler.slabs.moves)
        scheduler.slabs.moves.clear()
        self._load(step)
        if not step.chunks:
            return step, [], torch.empty(0)
        logits = self._model.forward(pack(step.chunks, scheduler.slabs, self._cache, self._router, self._model.device))
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.size
        return step, [chunk.sequence for chunk in step.chunks if chunk.samples], logits

    def cancel_waiting(self) -> list[int]:
        """Drop the rows that have not started; their keys."""
        keys = sorted({sequence.request.key for sequence in self._scheduler.cancel_waiting()})
        for key in keys:
            del self._rows[key]
        return keys

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
    def stats(self) -> EngineStats:
        """Counters so far."""
        self._stats.preemptions = self._scheduler.preemptions
        self._stats.running = len(self._scheduler.running)
        self._stats.resident = len(self._scheduler.slots.resident)
        return self._stats

    def _load(self, step: Step) -> None:
        for load in step.loads:
            deltas = self._adapters[load.adapter].deltas()
            for projection in self._model.projections:
                projection.put(load.slot, deltas)
            self._stats.adapter_evictions += load.evicted is not None
        self._stats.adapter_loads += len(step.loads)
        self._stats.waves += bool(step.loads) or not self._stats.steps

    def _count(self, step: Step) -> None:
        self._stats.steps += 1
        for sequence, start, size, _ in step.chunks:
            self._stats.prompt_tokens += max(0, min(size, len(sequence.request.prompt) - start))

    def _emit(self, sequences: list[Sequence], draws: list[Draw]) -> list[Result]:
        """Append the drawn tokens; collect the rows all of whose answers are now complete."""
        finished: list[Result] = []
        for sequence, (token, logprob) in zip(sequences, draws, strict=True):
            request = sequence.request
            if request.key not in self._rows:
                continue  # another answer of this row failed in this very step
            if token is None:
                finished.append(self._fail(sequence, "the model's output was not finite (NaN or infinity)"))
                continue
            sequence.tokens.append(token)
            self._stats.completion_tokens += 1
            if logprob is not None:
                sequence.logprobs.append(logprob)
            reason, stop_string = self._ending(sequence, token)
            if reason is None:
                continue
            self._scheduler.finish(sequence)
            done = self._rows[request.key]
            done.append(
                Completion(
                    index=sequence.index,
                    token_ids=sequence.tokens[len(request.prompt) :],
                    finish_reason=reason,
                    stop_string=stop_string,
                    logprobs=sequence.logprobs if request.sampling.logprobs is not None else None,
                )
            )
            if len(done) == request.sampling.n:
                del self._rows[request.key]
                done.sort(key=lambda completion: completion.index)
                finished.append(Result(request.key, len(request.prompt), done))
        return finished

    def _ending(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, str | None]:
        sampling = sequence.request.sampling
        if (token in self._eos and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return FinishReason.STOP, None
        if sampling.stop and self._decode is not None:
            # Enough of the tail for the longest stop string (a token is a byte or more), and some for its first
            # token to be decoded as it is in the whole.
            window = max(len(stop.encode()) for stop in sampling.stop) + 8
            tail = self._decode(sequence.tokens[max(len(sequence.request.prompt), len(sequence.tokens) - window) :])
            found = [(tail.index(stop), stop) for stop in sampling.stop if stop in tail]
            if found:
                return FinishReason.STOP, min(found)[1]
        if sequence.generated >= sampling.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _fail(self, sequence: Sequence, why: str) -> Result:
        """End a row with an error, its other answers included."""
        key = sequence.request.key
        scheduler = self._scheduler
        for other in [s for s in scheduler.running if s.request.key == key]:
            scheduler.finish(other, failed=True)
        for other in [s for s in scheduler.waiting if s.request.key == key]:
            scheduler.waiting.remove(other)
        del self._rows[key]
        return Result(key, len(sequence.request.prompt), [], error=why)

    def _make_slabs(self) -> Slabs:
        config, device = self.config, self.device
        longest = config.max_row_tokens or config.base.max_model_len
        per_token = bytes_per_token(self._model.shapes, self._model.dtype)
        slab_tokens = max(_SLAB_TOKENS[device], longest)
        budget = config.kv_cache_memory
        if budget is None:
            budget = int(free_memory(self.device) * _MEMORY_SHARE[device])
        elif budget < slab_tokens * per_token:
            slab_tokens = longest  # a small cache holds at least one row
        count = budget // (slab_tokens * per_token)
        if count < 1:
            raise ModelError(
                f"a row of {longest} tokens needs {longest * per_token / 2**20:.1f} MiB of cache and "
                f"{budget / 2**20:.1f} MiB are allowed: raise --kv-cache-memory or lower --max-model-len"
            )
        # Every row at its longest with the waste of its size class, and a slab begun in each class: never more.
        ceiling = -(-self.max_num_seqs * 5 * longest // (4 * slab_tokens)) + len(size_classes(longest))
        return Slabs(min(count, ceiling), slab_tokens)
