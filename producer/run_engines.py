"""The engines of a run on several devices: where they are, and what they open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from loramill.producer.options import RunOptions
from loramill.producer.run_job import RunJob
from loramill.producer.run_queue import LEASE_S
from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.devices import Device, names_of, take_each
from loramill.worker.registry import read_registry
from loramill.worker.settings import ModelOptions
from loramill.worker.worker_settings import WorkerOptions

_FLAG = "--devices"


def devices_of(options: RunOptions) -> Sequence[Device]:
    """Those of `--devices`, taken unless the job is only to be explained; none without the flag. Raises Failure, USAGE
    too for what does not go with it."""
    if not options.devices:
        return ()
    reasons = {
        "--device": options.device != "auto" and "give the one or the other",
        "--lora-mode static": options.lora_mode == "static" and "adapters are served side by side there",
        "--order input": options.order == "input" and "whoever is free takes what comes next",
    }
    for flag, why in reasons.items():
        if why:
            raise Failure(ExitCode.USAGE, f"{flag} and {_FLAG} do not go together: {why}")
    names_of(options.devices, _FLAG)
    return () if options.explain else take_each(options.devices, _FLAG)


def settings_of(job: RunJob) -> WorkerOptions:
    """Of an engine that opens what the job needs, and nothing else: what cannot be served is not its concern."""
    options = job.options
    given = read_registry(options).adapters
    names = dict.fromkeys([*job.index.adapters, *options.pinned])
    settings: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(ModelOptions)}
    settings |= {"adapters": {name: given[name].spec for name in names if name in given}, "adapters_json": {}}
    settings |= {"adapters_dir": None, "adapters_file": None, "longest_row": int(job.longest_row.max(initial=1))}
    return WorkerOptions(**settings, store=f"sqlite:///{options.queue_path}", lease_s=LEASE_S)
