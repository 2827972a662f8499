"""The options of `loramill`'s commands: those that only they have, beside the settings of `worker/settings.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from loramill.producer.targets import errors_beside
from loramill.worker.settings import (
    ADAPTER_FLAGS,
    ALLOW_NOOP,
    BASE_HELP,
    DEVICE,
    FILE,
    MAX_RANK,
    MODEL_FLAGS,
    POSITIVE,
    ModelOptions,
    flag,
    flagged,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(ModelOptions):
    """One run, as the person asked for it."""

    input: str
    output: Path
    errors: Path | None = None
    devices: str | None = None
    """Several engines, each in a process of its own, instead of one in this process."""
    limit: int | None = None
    on_invalid: str = "fail"
    overwrite: bool = False
    allow_failures: bool = False
    explain: bool = False
    json: bool = False
    quiet: bool = False

    @property
    def errors_path(self) -> Path:
        """Where failed rows go: `out.jsonl.gz` has `out.errors.jsonl.gz` beside it."""
        return self.errors or errors_beside(self.output)

    @property
    def journal_path(self) -> Path:
        """The run's finished rows until the output is whole."""
        return self.output.with_name(self.output.name + ".journal")

    @property
    def queue_path(self) -> Path:
        """With `devices`: the run's rows, finished or not, until the output is whole."""
        return self.output.with_name(self.output.name + ".queue")


_RUN_FLAGS = [
    flag("--input", "-i", required=True, metavar="IN", help="Job lines: .jsonl, .jsonl.gz, .jsonl.zst, or - (stdin)."),
    flag("--output", "-o", required=True, type=FILE, metavar="OUT", help="Result lines, in input order."),
    flag("--errors", type=FILE, metavar="FILE", help="Failed rows.  [default: OUT with .errors before .jsonl]"),
    *MODEL_FLAGS,
    flag("--devices", metavar="all|cuda:N,...", help="Every free GPU of this machine, or these: an engine on each."),
    flag("--limit", type=POSITIVE, metavar="N", help="Only the first N rows."),
    flag("--on-invalid", type=click.Choice(["fail", "skip"]), default="fail",
         help="Invalid lines stop the run before it starts, or go to the error file."),
    flag("--no-dedupe", is_flag=True, help="Compute rows one by one though they must come to the same answer."),
    flag("--overwrite", is_flag=True, help="Replace an output that exists, and a journal of another job."),
    flag("--allow-failures", is_flag=True, help="Exit 0 though rows failed."),
    flag("--explain", is_flag=True, help="Print the plan and run nothing."),
    flag("--json", is_flag=True, help="Print one JSON object with the run's numbers on stdout at the end."),
    flag("--quiet", is_flag=True, help="No progress."),
]  # fmt: skip


_EACH_JSON = flag("--json", is_flag=True, help="One JSON object an adapter.")
_LIST_FLAGS = [
    *ADAPTER_FLAGS,
    flag("--base-model", metavar="PATH_OR_ID", help="Say whether they fit it: a model folder, or an id on the hub."),
    ALLOW_NOOP, MAX_RANK, _EACH_JSON,
]  # fmt: skip
_VERIFY_FLAGS = [
    *ADAPTER_FLAGS,
    flag("--base-model", required=True, metavar="PATH_OR_ID", help=BASE_HELP),
    flag("--prompt", default="The quick brown fox", metavar="TEXT", help="What is completed."),
    ALLOW_NOOP, MAX_RANK, DEVICE, _EACH_JSON,
]  # fmt: skip


run_options = flagged(_RUN_FLAGS)
"""Decorates a click command that takes RunOptions' fields as keyword arguments."""
list_options = flagged(_LIST_FLAGS)
"""Of commands about adapters, with or without a base."""
verify_options = flagged(_VERIFY_FLAGS)
