"""How much of the memory keys and values get."""

from __future__ import annotations

from loramill.worker.cache import bytes_per_token
from loramill.worker.config import EngineConfig
from loramill.worker.memory import free_memory
from loramill.worker.model import Model, ModelError
from loramill.worker.room import Room

PAGE_TOKENS = 16
"""What a row leaves empty of its last page, half of it on average, and how much of a prefix that rows have in common is
computed by each: less is better for both. A page of one head should still be some lines of memory: 2 KiB at 64 x 16 in
bfloat16."""
_MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.85}
"""How much of the memory that is free once the weights are loaded `kv_cache_memory=None` may take."""


def make_room(config: EngineConfig, model: Model, max_num_seqs: int, kept_bytes: int) -> Room:
    """Room for rows of the longest kind, as many as can run within what is allowed; `kept_bytes` is for others.

    Raises:
        ModelError: the cache memory holds no row.
    """
    device = model.device.type
    longest = config.max_row_tokens or config.base.max_model_len
    page_bytes = PAGE_TOKENS * bytes_per_token(model.shapes, model.dtype)
    budget = config.kv_cache_memory
    if budget is None:
        budget = int(max(0, free_memory(device) - kept_bytes) * _MEMORY_SHARE[device])
    needed = -(-longest // PAGE_TOKENS)  # pages of a row
    if budget < needed * page_bytes:
        raise ModelError(
            f"a row of {longest} tokens needs {needed * page_bytes / 2**20:.1f} MiB of cache and "
            f"{budget / 2**20:.1f} MiB are allowed: raise --kv-cache-memory or lower --max-model-len"
        )
    pages = min(budget // page_bytes, max_num_seqs * needed)
    return Room(pages, PAGE_TOKENS, rows=max_num_seqs, longest=longest, sharing=config.prefix_sharing)
