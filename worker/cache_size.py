"""How much of the memory keys and values get."""

from __future__ import annotations

from loramill.worker.cache import bytes_per_token
from loramill.worker.config import EngineConfig
from loramill.worker.memory import free_memory
from loramill.worker.model import Model, ModelError
from loramill.worker.slabs import Slabs, size_classes

_SLAB_TOKENS = {"cpu": 8192, "cuda": 65536}
"""On a CPU about 32 rows of 256 tokens: their keys and values of one layer stay in cache (1.4 ms for 32 rows against
9.5 ms for 128 at once, one core). On a GPU few launches matter more."""
_MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.85}
"""How much of the memory that is free once the weights are loaded `kv_cache_memory=None` may take."""


def make_slabs(config: EngineConfig, model: Model, max_num_seqs: int, kept_bytes: int) -> Slabs:
    """Slabs for rows of the longest kind, as many as rows can need within what is allowed; `kept_bytes` is for others.

    Raises:
        ModelError: the cache memory holds no row.
    """
    device = model.device.type
    longest = config.max_row_tokens or config.base.max_model_len
    per_token = bytes_per_token(model.shapes, model.dtype)
    slab_tokens = max(_SLAB_TOKENS[device], longest)
    budget = config.kv_cache_memory
    if budget is None:
        budget = int(max(0, free_memory(device) - kept_bytes) * _MEMORY_SHARE[device])
    elif budget < slab_tokens * per_token:
        slab_tokens = longest  # a small cache holds at least one row
    count = budget // (slab_tokens * per_token)
    if count < 1:
        raise ModelError(
            f"a row of {longest} tokens needs {longest * per_token / 2**20:.1f} MiB of cache and "
            f"{budget / 2**20:.1f} MiB are allowed: raise --kv-cache-memory or lower --max-model-len"
        )
    # Every row at its longest with the waste of its size class, and a slab begun in each class: never more.
    ceiling = -(-max_num_seqs * 5 * longest // (4 * slab_tokens)) + len(size_classes(longest))
    return Slabs(min(count, ceiling), slab_tokens)
