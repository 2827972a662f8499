"""loramill itself, through the command that a person types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.job import Job
from bench.peers.runner import Answers


class Loramill:
    """`loramill run` over the job: adapters loaded and evicted as its plan needs, or all rows by the base.

    8 slots are the command's default, and evict here; 16 hold every adapter, as PEFT does.
    """

    def __init__(self, *, slots: int = 0) -> None:
        """`slots` is --max-loras-per-batch; 0 is the base alone."""
        self.slots = slots
        self.lora = slots > 0
        self.name = {0: "loramill-base", 8: "loramill"}.get(slots, f"loramill-{slots}")
        self.title = f"loramill, dynamic, {slots} slots" if slots else "loramill, no LoRA"
        self.command = Path(sys.executable).with_name("loramill")

    def absent(self) -> str | None:
        return None if self.command.exists() else "the loramill command is not installed beside this Python"

    def load(self, job: Job) -> None:
        """The command loads by itself and says how long it ran without that."""

    def run(self, job: Job) -> Answers:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "out.jsonl"
            command = [self.command, *self.arguments(job, output)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"loramill ended with {done.returncode}")
            tokens = {}
            for line in map(json.loads, output.read_text().splitlines()):
                tokens[line["custom_id"]] = line["response"]["body"]["choices"][0]["token_ids"]
        summary = json.loads(done.stdout)
        run_s, load_s = summary.pop("run_s"), summary.pop("load_s")
        counted = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        return Answers(run_s, tokens, load_s, details={"command": self.shown(job), **counted})

    def arguments(self, job: Job, output: Path) -> list[str]:
        """The command line after `loramill`."""
        slots = ["--max-loras-per-batch", str(self.slots), "--lora-mode", "dynamic"]
        return [
            "run",
            *("-i", str(job.input_file(lora=self.lora))),
            *("-o", str(output)),
            *("--base-model", str(job.base)),
            *(["--adapters-dir", str(job.adapters), *slots] if self.lora else []),
            *("--dtype", "bfloat16"),
            *("--device", "cpu"),
            "--json",
            "--quiet",
        ]

    def shown(self, job: Job) -> str:
        """The command line with the job's folder left out of its paths."""
        shown = " ".join(["loramill", *self.arguments(job, job.folder / "out.jsonl")])
        return shown.replace(f"{job.folder}{os.sep}", "")
