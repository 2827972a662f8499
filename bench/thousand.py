"""`python -m bench.thousand`: 1,000 adapters over 20,000 rows (Zipf) of the tiny model, by plan and as servers do it.

Whether each adapter is loaded once, what the host tier holds, and what arrival order with LRU costs beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import ROOT, command, hide_root
from bench.job import zipf_counts
from bench.keep import keep

ADAPTERS, ROWS, ZIPF = 1000, 20_000, 1.0
RANKS = (4, 8, 16, 32)
BASE = ROOT / "examples" / "tiny" / "base"
HOST_BYTES = 32 * 2**20
RUNS = {
    "plan": ["--lora-eviction-policy", "plan"],
    "planned order, lru": ["--lora-eviction-policy", "lru"],
    "input order, plan": ["--order", "input", "--lora-eviction-policy", "plan"],
    "input order, lru": ["--order", "input", "--lora-eviction-policy", "lru"],
}
KEPT = (
    "rows", "failed", "run_s", "total_s", "adapter_loads", "adapter_evictions", "waves", "adapter_load_s", "host_loads",
    "host_hits", "host_evictions", "host_bytes_read", "host_read_s", "host_waited_s",
    "host_most_bytes", "max_rss_bytes",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.thousand", description=__doc__)
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--host-bytes", type=int, default=HOST_BYTES, help="--lora-host-bytes (default 32 MiB)")
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "bench", help="where adapters and jobs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "thousand.json")
    options = parser.parse_args(arguments)
    folder = prepare(options.adapters, options.rows, options.dir)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for _ in range(options.repeats):
        for name, flags in RUNS.items():
            summary, lines = command.run(_arguments(folder, options.host_bytes, flags))
            assert len(lines) == options.rows
            runs[name].append({key: summary[key] for key in KEPT})
            print(f"{name}: {summary['run_s']:.1f} s, {summary['adapter_loads']} loads", file=sys.stderr, flush=True)
    found = {
        "job": {"adapters": options.adapters, "rows": options.rows, "zipf": ZIPF, "ranks": RANKS},
        "host_bytes": options.host_bytes,
        "runs": runs,
    }
    keep(options.out, "thousand", "bench.thousand", arguments, found)
    return 0


def prepare(adapters: int, rows: int, cache: Path) -> Path:
    """The adapters and the shuffled rows, made under `cache` unless they are there."""
    folder = cache / f"tiny-{adapters}-adapters-{rows}-rows"
    if folder.exists():
        return folder
    making = folder.with_name(f"{folder.name}.making")
    (making / "adapters").mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    config = json.loads((BASE / "config.json").read_text())
    for number in range(adapters):
        _write_adapter(making / "adapters" / f"a{number:04d}", config, RANKS[number % len(RANKS)], number)
    draw = random.Random(0)
    names = [f"a{n:04d}" for n, count in enumerate(zipf_counts(rows, adapters, ZIPF)) for _ in range(count)]
    draw.shuffle(names)
    with (making / "rows.jsonl").open("w") as file:
        for number, name in enumerate(names):
            prompt = [draw.randrange(3, 200) for _ in range(draw.randrange(8, 24))]
            line = {"id": str(number), "adapter": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
            file.write(json.dumps(line | {"ignore_eos": True}) + "\n")
    making.rename(folder)
    return folder


def _write_adapter(folder: Path, base: dict[str, Any], rank: int, seed: int) -> None:
    """A PEFT adapter on the attention's projections, random in A and in B."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    hidden = base["hidden_size"]
    key_value = hidden // base["num_attention_heads"] * base["num_key_value_heads"]
    widths = {"q_proj": hidden, "k_proj": key_value, "v_proj": key_value, "o_proj": hidden}
    tensors = {}
    for layer in range(base["num_hidden_layers"]):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.05
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, rank, generator=generator) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(widths)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _arguments(folder: Path, host_bytes: int, flags: Sequence[str]) -> list[str]:
    return [
        *("-i", str(folder / "rows.jsonl")),
        *("--base-model", str(BASE)),
        *("--adapters-dir", str(folder / "adapters")),
        *("--lora-host-bytes", str(host_bytes)),
        *("--lora-mode", "dynamic"),
        *flags,
    ]


if __name__ == "__main__":
    hide_root()
    sys.exit(main(sys.argv[1:]))
