"""The options of `loramill submit` and `loramill validate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import click

from loramill.producer.job_limits import MAX_JOB_BYTES, MAX_JOB_ROWS
from loramill.producer.store_options import StoreOptions
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.durations import seconds_of
from loramill.worker.settings import OFFER_FLAGS, POSITIVE, SEED, ModelOptions, flag, flagged, size
from loramill.worker.worker_settings import BROKER, STORE_FLAGS

if TYPE_CHECKING:
    from loramill.producer.ask import Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions(StoreOptions):
    """One submit or validate, as the person asked for it."""

    input: str
    base: str | None = None
    limit: int | None = None
    on_invalid: Literal["fail", "skip"] = "fail"
    job_id: str | None = None
    priority: int = 0
    window_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    no_dedupe: bool = False
    broker: str | None = None
    max_job_rows: int = MAX_JOB_ROWS
    max_job_bytes: int | None = MAX_JOB_BYTES
    wait: bool = False
    json: bool = False
    quiet: bool = False
    seed: int = 0
    model: ModelOptions | None = None
    """Opened here, where that is asked for."""

    @property
    def ask(self) -> Ask:
        """Raises Failure (USAGE)."""
        from loramill.producer.ask import Ask, new_id

        try:
            return Ask(
                id=new_id() if self.job_id is None else self.job_id,
                priority=self.priority,
                window_s=self.window_s,
                metadata=self.metadata,
                seed=self.seed,
                dedupe=not self.no_dedupe,
                on_invalid=self.on_invalid,
                limit=self.limit,
                max_rows=self.max_job_rows,
                max_bytes=self.max_job_bytes or MAX_JOB_BYTES,
            )
        except ValueError as error:
            raise Failure(ExitCode.USAGE, str(error)) from error


def options_of(given: dict[str, Any]) -> SubmitOptions:
    """What a command was given; raises Failure (USAGE) for what cannot be meant."""
    model = {one.name: given.pop(one.name) for one in fields(ModelOptions) if one.name in given}
    if model["base_model"] is None:
        sources = ("adapters", "adapters_json", "adapters_dir", "adapters_file")
        if any(model[name] for name in sources):
            raise Failure(ExitCode.USAGE, "adapters are given without --base-model: what workers serve, they say")
        return SubmitOptions(**given, seed=model["seed"])
    return SubmitOptions(**given, seed=model["seed"], model=ModelOptions(**model))


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Every `KEY=VALUE`."""
    pairs: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or key in pairs:
            why = "is not KEY=VALUE" if not equals else "gives a key twice"
            raise click.BadParameter(f"{value!r} {why}", ctx, param)
        pairs[key] = text
    return pairs


_CHECK_FLAGS = [
    flag("--base", metavar="NAME", help="Which base the rows are for, where workers serve several."),
    flag("--limit", type=POSITIVE, metavar="N", help="Only the first N rows."),
    flag("--max-job-rows", type=POSITIVE, default=MAX_JOB_ROWS, help="Jobs of more rows are refused."),
    flag("--max-job-bytes", callback=size, default="64GiB", metavar="SIZE", help="Jobs of more bytes are refused."),
    flag("--json", is_flag=True, help="Print one JSON object on stdout."),
    flag("--quiet", is_flag=True, help="No progress."),
]
_MODEL_FLAGS = [
    flag("--base-model", metavar="PATH_OR_ID",
         help="Check against this model and publish what it offers, before any worker does; no weights are loaded."),
    *OFFER_FLAGS,
    SEED,
]  # fmt: skip
# What is about one job has no variable: `--id`'s would be a worker's too.
_SUBMIT_FLAGS = [
    click.option("--wait", is_flag=True, help="Wait until it has ended; the exit code says how."),
    flag("--priority", type=int, default=0, help="Higher goes first; from -100 to 100."),
    flag("--window", dest="window_s", callback=seconds_of, metavar="TIME",
         help="What is not finished after so long (4h, 90m) expires."),
    flag("--metadata", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Kept with the job; repeat it."),
    flag("--on-invalid", type=click.Choice(["fail", "skip"]), default="fail",
         help="Invalid lines refuse the whole input, or go to the error file."),
    flag("--no-dedupe", is_flag=True, help="Compute identical rows again and again."),
    BROKER,
    click.option("--id", "job_id", metavar="ID", help="The job's. The same submit again is then the same job."),
]  # fmt: skip
_INPUT = click.argument("input", metavar="FILE")

submit_options = flagged([_INPUT, *STORE_FLAGS, *_SUBMIT_FLAGS, *_CHECK_FLAGS, *_MODEL_FLAGS])
"""Decorates a click command that takes what `options_of` does."""
validate_options = flagged([_INPUT, *STORE_FLAGS, *_CHECK_FLAGS, *_MODEL_FLAGS])
"""The same of what stores nothing."""
