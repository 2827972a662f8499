"""loramill itself, through the command that a person types."""

from __future__ import annotations

import os
import subprocess
from functools import cache

from bench import command
from bench.job import Job
from bench.peers.runner import Answers, Runner


class Loramill(Runner):
    """`loramill run` over the job: all rows by the base, or by adapters in one of its modes.

    By default the command has a slot for each adapter, up to 64. 8 slots evict where there are more adapters.
    """

    def __init__(self, name: str, about: str, *, slots: int = 0, mode: str = "", flags: tuple[str, ...] = ()) -> None:
        """`slots` is --max-loras-per-batch, 0 the default; with neither slots nor a mode the base answers alone."""
        self.name, self.title = name, f"loramill, {about}"
        self.lora = bool(slots or mode)
        self.slots, self.mode, self.flags = slots, mode or "dynamic", flags

    def absent(self) -> str | None:
        if not command.COMMAND.exists():
            return "the loramill command is not installed beside this Python"
        unknown = [flag for flag in self.flags if flag not in _help()]
        return f"this loramill has no {unknown[0]}" if unknown else None

    def load(self, job: Job) -> None:
        """The command loads by itself and says how long it ran without that."""

    def run(self, job: Job) -> Answers:
        summary, lines = command.run(self.arguments(job))
        tokens = {line["custom_id"]: line["response"]["body"]["choices"][0]["token_ids"] for line in lines}
        run_s, load_s = summary.pop("run_s"), summary.pop("load_s")
        counted = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        return Answers(
            run_s,
            tokens,
            load_s,
            peak_bytes=summary["max_rss_bytes"],
            details={"command": self.shown(job), **counted},
        )

    def arguments(self, job: Job) -> list[str]:
        """The command line after `loramill run`, without what `command.run` adds."""
        slots = ["--max-loras-per-batch", str(self.slots)] if self.slots else []
        adapters = ["--adapters-dir", str(job.adapters), *slots, "--lora-mode", self.mode]
        return [
            *("-i", str(job.input_file(lora=self.lora))),
            *("--base-model", str(job.base)),
            *(adapters if self.lora else []),
            *("--dtype", "bfloat16"),
            *("--device", "cpu"),
            *self.flags,
        ]

    def shown(self, job: Job) -> str:
        """The command line with the folders of the job left out of its paths."""
        shown = " ".join(["loramill run", *self.arguments(job), "-o out.jsonl --json --quiet"])
        for folder in (job.folder, job.base.parent):
            shown = shown.replace(f"{folder}{os.sep}", "")
        return shown


@cache
def _help() -> str:
    done = subprocess.run([command.COMMAND, "run", "--help"], capture_output=True, text=True, check=False)
    return done.stdout
