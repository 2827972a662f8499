"""`loramill doctor`: one screen that says what works here, what does not, and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

import loramill
from loramill.producer.store_options import StoreOptions, store_of
from loramill.schemas.failures import ExitCode, Failure
from loramill.store.contract import JobStore
from loramill.store.errors import StoreLost

LITTLE_DISK = 10 * 2**30
SMALL_DISK = 2**30
_GIB = 2**30


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    """It works, and something will not, or not well."""
    FAIL = "fail"


@dataclass(slots=True, frozen=True)
class Finding:
    """One line of the screen."""

    what: str
    state: State
    said: str
    advice: str = ""
    """What to do."""


Check = Callable[[], Iterator[Finding]]


def doctor(options: StoreOptions, output: Path, *, json: bool, **models: Any) -> ExitCode:
    """Looks at everything and prints it: OK unless something fails, MACHINE otherwise."""
    from loramill.producer import doctor_engine as engine  # torch takes seconds; the first lines must not wait for it

    checks: dict[str, Check] = {
        "python": python,
        "packages": packages,
        "disk": lambda: disk(output),
        "programs": programs,
        "store": lambda: store(options),
        "device": lambda: engine.device(models["device"]),
        "triton": engine.triton,
        "native": engine.native,
        "kernel": lambda: engine.kernel(models["device"]),
        "models": lambda: engine.models(**models),
    }
    found = []
    for what, check in checks.items():
        for finding in examined(what, check):
            found.append(finding)
            if not json:
                click.echo(line_of(finding))
    failed = any(finding.state is State.FAIL for finding in found)
    if json:
        click.echo(as_json(found))
    return ExitCode.MACHINE if failed else ExitCode.OK


def examined(what: str, check: Check) -> Iterator[Finding]:
    """What a check finds; one that breaks has found that. A doctor that dies of a symptom is no use."""
    try:
        yield from check()
    except Failure as failure:
        if isinstance(failure.__cause__, StoreLost):
            yield Finding(what, State.WARN, str(failure), "that is so before the first submit")
            return
        for line in failure.lines:
            yield Finding(what, State.FAIL, line)
    except Exception as error:
        yield Finding(what, State.FAIL, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def line_of(finding: Finding) -> str:
    """`ok    store     sqlite 3.45 ...`."""
    advice = f": {finding.advice}" if finding.advice else ""
    return f"{finding.state:<5} {finding.what:<10} {finding.said}{advice}"


def as_json(findings: list[Finding]) -> str:
    """One object: `ok`, and every finding."""
    ok = all(finding.state is not State.FAIL for finding in findings)
    return json.dumps({"ok": ok, "loramill": loramill.__version__, "findings": [asdict(one) for one in findings]})


def python() -> Iterator[Finding]:
    """Who runs this."""
    said = f"{platform.python_version()} on {platform.system()} {platform.machine()}, loramill {loramill.__version__}"
    yield Finding("python", State.OK, said)


def packages() -> Iterator[Finding]:
    """What is installed: without the first group nothing runs, without the others some of it."""
    for names, state, advice in (
        (("torch", "transformers", "safetensors"), State.FAIL, "nothing can be computed here: install loramill again"),
        (("triton",), State.WARN, "the kernels for CUDA devices need it"),
        (("celery", "redis"), State.WARN, "workers and submits with a redis:// store need it"),
        (("fsspec",), State.WARN, "--files needs it"),
    ):
        there = {name: version for name in names if (version := version_of(name))}
        if there:
            yield Finding("packages", State.OK, ", ".join(f"{name} {version}" for name, version in there.items()))
        for name in names:
            if name not in there:
                yield Finding("packages", state, f"{name} is not installed", advice)


def version_of(package: str) -> str | None:
    """Of an installed package, by what its files say: importing some takes seconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def disk(output: Path) -> Iterator[Finding]:
    """Room where results go, and where inputs that are no plain files are spooled."""
    for what, folder in (("results", output.resolve()), ("temporary files", Path(tempfile.gettempdir()))):
        try:
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            yield Finding("disk", State.FAIL, f"{folder}: {error.strerror or error}", f"{what} go there")
            continue
        state = State.FAIL if free < SMALL_DISK else State.WARN if free < LITTLE_DISK else State.OK
        advice = "" if state is State.OK else f"make room: {what} go there"
        yield Finding("disk", state, f"{folder}: {free / _GIB:,.1f} GiB free for {what}", advice)


def programs() -> Iterator[Finding]:
    """What is on the path."""
    path = shutil.which("redis-server")
    if path is None:
        yield Finding("programs", State.OK, "no redis-server on this machine; a store can be elsewhere, or sqlite:///")
        return
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout.split()
    version = next((word.removeprefix("v=") for word in said if word.startswith("v=")), "of an unknown version")
    old = version.split(".")[0].isdigit() and int(version.split(".")[0]) < 7
    advice = "stores need redis 7 or later" if old else ""
    yield Finding("programs", State.WARN if old else State.OK, f"redis-server {version}", advice)


def store(options: StoreOptions) -> Iterator[Finding]:
    """The store and its workers, where there is one."""
    if not options.store:
        yield Finding("store", State.OK, "none is given; with --store or LORAMILL_STORE it is looked at too")
        return
    with store_of(options) as opened:
        yield from _of_store(opened)


def _of_store(opened: JobStore) -> Iterator[Finding]:
    info = opened.info()
    limit = f" of {info.limit_bytes / _GIB:,.1f}" if info.limit_bytes else ""
    said = f"{info.url}: {info.server}, {info.used_bytes / _GIB:,.2f}{limit} GiB, {info.pending_rows:,} rows to do"
    durable = "a restart of the server loses jobs: switch its append-only file on"
    yield Finding("store", State.OK if info.durable else State.WARN, said, "" if info.durable else durable)
    for warning in info.warnings:
        yield Finding("store", State.WARN, warning)
    workers, ready = opened.workers(), sum(opened.ready().values())
    if not workers:
        state = State.WARN if ready else State.OK
        yield Finding(
            "workers", state, f"none was heard of lately, {ready:,} shards wait", "`loramill worker` starts one"
        )
    for worker in workers:
        died = f"its engine died {worker.restarts} times: look at its log" if worker.restarts else ""
        said = f"{worker.id}: {worker.device} on {worker.host}, {worker.state}, {worker.rows_done:,} rows done"
        yield Finding("workers", State.WARN if died else State.OK, said, died)
