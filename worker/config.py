"""How one engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from loramill.worker.model import BaseInfo
from loramill.worker.slots import Eviction


@dataclass(slots=True, frozen=True)
class EngineConfig:
    """How one engine runs."""

    base: BaseInfo
    dtype: str = "auto"
    """auto (the checkpoint's), bfloat16, float16 or float32."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    max_loras_per_batch: int = 8
    """Adapters in device slots at once."""
    max_loaded_loras: int | None = None
    """Adapters in host memory at once; None sets no limit."""
    lora_host_bytes: int | None = None
    """Of host memory for adapters; None takes what there are, within a share of what is free."""
    lora_eviction: Eviction = Eviction.PLAN
    pinned: frozenset[str] = frozenset()
    """Content hashes of adapters that are never evicted."""
    merging: bool = True
    """Whether memory is kept for merged weights; without, rows that ask for them may run out of it."""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 8192
    kv_cache_memory: int | None = None
    """Bytes; None takes what the rows can need, within a share of what is free."""
    prefix_sharing: bool = True
    """Whether what the prompts of a mix have in common is computed once."""
    overlap: bool | None = None
    """Whether the host decides and lays out a pass while the one before it runs; None is where it runs on a device."""
    max_row_tokens: int | None = None
    """The longest row to come, prompt and answer; None is the model's context."""
