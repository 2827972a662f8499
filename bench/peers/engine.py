"""loramill's engine called as a library: where the command's own dependencies are not installed, as on a lent GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from bench.job import Job, Row
from bench.peers.runner import Answers, Runner
from loramill.producer.plan import plan
from loramill.producer.waves import Limits, MixFacts
from loramill.worker.adapters import open_adapter
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import describe_base
from loramill.worker.request import Request, Sampling, plain


class EngineRunner(Runner):
    """Every row by its adapter over `slots` slots; 0 slots is the base alone."""

    def __init__(
        self, slots: int, device: str, max_num_seqs: int, dtype: str = "bfloat16", *, prefix_sharing: bool = True
    ) -> None:
        self.slots = slots
        self.lora = slots > 0
        self.name = f"loramill-{slots}" if slots else "loramill-base"
        self.title = f"loramill, {slots} slots" if slots else "loramill, no LoRA"
        self._device, self._max_num_seqs, self._dtype = device, max_num_seqs, dtype
        self._prefix_sharing = prefix_sharing

    def absent(self) -> str | None:
        """Never: it is the product."""
        return None

    def load(self, job: Job) -> None:
        base = describe_base(str(job.base))
        names = job.adapter_names if self.lora else []
        adapters = {name: open_adapter(str(job.adapters / name), base, max_rank=job.spec.rank) for name in names}
        self._hashes = {name: adapter.sha256 for name, adapter in adapters.items()}
        longest = job.spec.prompt_tokens + job.spec.output_tokens
        config = EngineConfig(
            base,
            dtype=self._dtype,
            device=self._device,
            max_loras_per_batch=max(1, self.slots),
            max_num_seqs=self._max_num_seqs,
            max_row_tokens=longest,
            prefix_sharing=self._prefix_sharing,
        )
        self.model = Engine(config, adapters.values())

    def run(self, job: Job) -> Answers:
        rows = job.rows()
        started = time.perf_counter()
        before = (self.model.stats.adapter_loads, self.model.stats.steps)
        self.add(job)
        tokens = {}
        while self.model.has_work:
            for result in self.model.step():
                tokens[rows[result.key].custom_id] = result.completions[0].token_ids
        run_s = time.perf_counter() - started
        after = (self.model.stats.adapter_loads, self.model.stats.steps)
        loads, steps = (now - then for now, then in zip(after, before, strict=True))
        return Answers(run_s, tokens, details={"adapter_loads": loads, "steps": steps})

    def add(self, job: Job) -> None:
        """Queue every row, in the order of the plan."""
        rows = job.rows()
        for number in self._order(rows, job):
            row = rows[number]
            sampling = Sampling(row.output_tokens, temperature=0, ignore_eos=True)
            self.model.add(Request(number, row.prompt, sampling, plain(self._hashes.get(row.adapter))))

    def _order(self, rows: Sequence[Row], job: Job) -> list[int]:
        """As the command plans them."""
        numbers = {name: number for number, name in enumerate(job.adapter_names)} if self.lora else {}
        adapter = np.array([numbers.get(row.adapter, -1) for row in rows], dtype=np.int32)
        prompt = np.array([len(row.prompt) for row in rows], dtype=np.int64)
        answer = np.array([row.output_tokens for row in rows], dtype=np.int64)
        facts = [MixFacts((number,), job.spec.rank) for number in numbers.values()]
        limits = Limits(max(1, self.slots), self._max_num_seqs, 8192)
        return [int(number) for number in plan(adapter, prompt, answer, facts, limits, mode="dynamic").rows]
