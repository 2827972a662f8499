"""vLLM's offline interface on a CPU, from an environment of its own, set up as its makers advise for throughput.

It runs where `BENCH_VLLM_PYTHON` says, or else in `.venv-vllm`, which `make bench-peers` makes. This file is imported
there too, so it asks for nothing but the standard library until it loads vLLM.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench.job import Job
from bench.peers.environment import absent, environment_python
from bench.peers.runner import Answers, Runner

BATCH_ROWS = 128
"""max_num_seqs: every runner here gets the same."""
CACHE_GIB = 4
"""VLLM_CPU_KVCACHE_SPACE: 288,000 tokens of the 100M shape, more than any point has at once."""


class Vllm(Runner):
    """`LLM.generate` with every prompt at once, as token ids; `max_loras` slots, or 0 for the base alone."""

    def __init__(self, max_loras: int = 0) -> None:
        self.max_loras = max_loras
        self.lora = max_loras > 0
        self.name = f"vllm-{max_loras}" if max_loras else "vllm"
        self.title = f"vLLM CPU, {max_loras} slots" if max_loras else "vLLM CPU, no LoRA"

    def python(self) -> Path:
        return environment_python("vllm")

    def absent(self) -> str | None:
        return absent("vllm", "vllm")

    def environment(self) -> dict[str, str]:
        """All cores for its worker, an explicit cache, and the two libraries that its guide says to load first."""
        preload = [str(path) for path in _preloaded(self.python())]
        return {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_LOGGING_LEVEL": "ERROR",
            **({"LD_PRELOAD": ":".join(preload)} if preload else {}),
        }

    def load(self, job: Job) -> None:
        """The engine, compiled, and every adapter known by its folder."""
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

        lora: dict[str, Any] = {"enable_lora": True, "max_loras": self.max_loras, "max_lora_rank": job.spec.rank}
        self.options = {
            "dtype": "bfloat16",
            "max_num_seqs": BATCH_ROWS,
            "max_model_len": job.spec.longest(),
            **(lora if self.lora else {}),
        }
        self.model = LLM(model=str(job.base), disable_log_stats=True, **self.options)
        self.model.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2), use_tqdm=False)

    def run(self, job: Job) -> Answers:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found,unused-ignore]

        rows = job.rows()
        prompts = [{"prompt_token_ids": row.prompt} for row in rows]
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=row.output_tokens, ignore_eos=True, detokenize=False)
            for row in rows
        ]
        adapters = {
            name: LoRARequest(name, number, str(job.adapters / name))
            for number, name in enumerate(job.adapter_names, start=1)
        }
        requests = [adapters[row.adapter] for row in rows] if self.lora else None
        started = time.perf_counter()
        outputs = self.model.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        run_s = time.perf_counter() - started
        tokens = {row.custom_id: list(one.outputs[0].token_ids) for row, one in zip(rows, outputs, strict=True)}
        preload = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
        return Answers(run_s, tokens, details={**self.options, "preloaded": preload, **_versions()})


def _preloaded(python: Path) -> list[Path]:
    """tcmalloc, as Debian has it or as BENCH_TCMALLOC names it, and the Intel OpenMP that came with vLLM."""
    named = os.environ.get("BENCH_TCMALLOC", "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
    found = [Path(named), python.parents[1] / "lib" / "libiomp5.so"]
    return [path for path in found if path.exists()]


def _versions() -> dict[str, str]:
    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__}
