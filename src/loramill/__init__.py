"""loramill: offline bulk inference over one base language model and many LoRA adapters."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramill.producer.async_mill import AsyncMill
    from loramill.producer.mill import Mill
    from loramill.producer.queue_api import Producer

__version__ = "0.1.0"
__all__ = ["AsyncMill", "Mill", "Producer", "__version__"]


def __getattr__(name: str) -> object:
    # Lazy: `import loramill` must not pull torch in (the producer side never needs it).
    if name in ("Mill", "AsyncMill"):
        from loramill.producer import async_mill

        return getattr(async_mill, name)
    if name == "Producer":
        from loramill.producer import queue_api

        return queue_api.Producer
    raise AttributeError(f"module 'loramill' has no attribute {name!r}")
