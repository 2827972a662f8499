"""Shows who answered what: `python examples/show.py IN.jsonl OUT.jsonl` prints a few answers of each adapter."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ANSWERS_SHOWN = 3


def read_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def question(job: dict[str, Any]) -> str:
    """What a job line asks, without the control tokens of a raw prompt."""
    body = job.get("body", job)
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return re.sub(r"<\|\w+\|>", "", text)


def answer(result: dict[str, Any]) -> str:
    """The first choice's text, of a chat or of a completion."""
    choice = result["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def main(jobs_path: str, results_path: str) -> None:
    """Prints one table row for the base and for each adapter."""
    questions = {str(job.get("custom_id", job.get("id"))): question(job) for job in read_lines(jobs_path)}
    pairs: dict[str | None, list[tuple[str, str]]] = defaultdict(list)
    for result in read_lines(results_path):
        adapter = result["response"]["body"]["loramill"]["adapter"]
        pairs[adapter].append((questions[result["custom_id"]], answer(result)))

    table = Table("adapter", "rows", "some of its answers", box=box.SIMPLE_HEAD)
    for adapter in sorted(pairs, key=lambda name: name or ""):
        shown = "   ".join(f"{asked} -> {got}" for asked, got in pairs[adapter][:ANSWERS_SHOWN])
        table.add_row(adapter or "(base)", str(len(pairs[adapter])), shown)
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: show.py IN.jsonl OUT.jsonl")
    main(sys.argv[1], sys.argv[2])
