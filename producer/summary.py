"""What a run came to, in numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Summary:
    """What a run came to. Rows and tokens are the whole job's; seconds, rates and adapter counts this process's."""

    rows: int = 0
    failed: int = 0
    invalid: int = 0
    """Among the failed: lines that were skipped as invalid."""
    resumed: int = 0
    """Rows that an earlier process finished."""
    prompt_tokens: int = 0
    prompt_tokens_shared: int = 0
    """Of them, those that this process did not compute: rows of the same adapter begin alike."""
    completion_tokens: int = 0
    load_s: float = 0.0
    """Loading the weights."""
    run_s: float = 0.0
    """First forward pass to last row done, adapter loading included."""
    total_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    completion_tokens_per_s: float = 0.0
    adapter_loads: int = 0
    """Into device slots."""
    adapter_evictions: int = 0
    adapter_load_s: float = 0.0
    """How long passes waited for that."""
    merges: int = 0
    merge_s: float = 0.0
    waves: int = 0
    host_loads: int = 0
    """From disk into host memory."""
    host_hits: int = 0
    """Adapters that were in host memory when a slot asked for one."""
    host_evictions: int = 0
    host_bytes_read: int = 0
    host_read_s: float = 0.0
    """Most of it beside the computing."""
    host_waited_s: float = 0.0
    """How long slots waited for it."""
    host_most_bytes: int = 0
    """The most held at once."""
    adapters_dynamic: int = 0
    """Adapters and mixes served side by side, and those merged one after another."""
    adapters_static: int = 0
    rows_by_device: dict[str, int] = field(default_factory=dict)
    """Of `--devices`: how many rows this process had done on each."""
    output: str = ""
    errors: str | None = None

    def count(self, stats: Mapping[str, Any], modes: Sequence[str]) -> None:
        """Take over what the engine counted in `run_s` (its stats as plain values), and the mode of each mix."""
        self.prompt_tokens_per_s = stats["prompt_tokens"] / self.run_s
        self.completion_tokens_per_s = stats["completion_tokens"] / self.run_s
        for name in (
            "prompt_tokens_shared",
            "adapter_loads",
            "adapter_evictions",
            "adapter_load_s",
            "merges",
            "merge_s",
            "waves",
        ):
            setattr(self, name, stats[name])
        for name, value in stats["host"].items():
            setattr(self, f"host_{name}", value)
        self.adapters_dynamic, self.adapters_static = modes.count("dynamic"), modes.count("static")

    def as_json(self) -> str:
        """One object; seconds and rates to the thousandth."""
        values = asdict(self).items()
        return json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in values})
