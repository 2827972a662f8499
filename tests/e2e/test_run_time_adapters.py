"""Adapters that come, change and go under a worker process that is busy all the while, with a real model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.cli import main
from loramill.schemas.failures import ExitCode
from loramill.schemas.job import JobNames, JobSpec, JobStatus, Pinned
from loramill.store.opening import open_store
from loramill.store.records import DoneRow, NewShard
from loramill.worker.adapters import open_adapter
from loramill.worker.model import describe_base
from tests.worker.queueing import until

LONG_S = 120


class Site:
    """A store, with a worker process that serves tiny_base with `one` and what else is in its folder."""

    def __init__(self, url: str, folder: Path, base: Path, prefix: str) -> None:
        self.url, self.folder, self.base, self.prefix = url, folder, base, prefix
        self.store = open_store(url, prefix=prefix, create=True)
        self.adapters = folder / "adapters"

    @contextmanager
    def working(self) -> Iterator[None]:
        flags = ["--base-model", self.base, "--adapters-dir", self.adapters, "--store", self.url, "--device", "cpu"]
        flags += ["--dtype", "float32", "--id", "w", "--store-prefix", self.prefix, "--max-lora-rank", "8"]
        code = "from loramill.producer.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "worker", *map(str, flags)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            until(lambda: [one.state for one in self.store.workers()] == ["ready"], LONG_S)
            yield
        finally:
            process.terminate()
            process.wait(30)

    def command(self, *arguments: object) -> int:
        """Its exit code. A file that others had locked for long, on a busy machine, is tried again, as it says."""
        code = int(ExitCode.MACHINE)
        for _ in range(5):
            with pytest.raises(SystemExit) as ended:
                main([*map(str, arguments), "--store", self.url, "--store-prefix", self.prefix])
            if (code := int(ended.value.code or 0)) != ExitCode.MACHINE:
                break
        return code

    def occupy(self, shards: int) -> None:
        """A job `load` of so many small shards, of rows for `one` and for the base in turn."""
        [serving] = self.store.manifests()
        names = JobNames(base=serving.base, adapters={"one": Pinned(key=serving.adapters[0].key)})
        self.store.stage(JobSpec(id="load", base_id=serving.base_id, names=names))
        for number in range(shards):
            rows = [8 * number + at for at in range(8)]
            lines = [{"id": f"r{row}", "adapter": "one" if row % 2 == 0 else "", "prompt": f"row {row}",
                      "max_tokens": 160, "ignore_eos": True} for row in rows]  # fmt: skip
            said = [(row, json.dumps(line).encode()) for row, line in zip(rows, lines, strict=True)]
            self.store.add_shard("load", NewShard(number, said, (serving.adapters[0].key,)))
        self.store.accept("load")

    def submit(self, job: str, models: list[str]) -> int:
        """A job of OpenAI's lines, one for each of `models`."""
        path = self.folder / f"{job}.jsonl"
        lines = [
            {
                "custom_id": f"{job}-{at}", "method": "POST", "url": "/v1/completions",
                "body": {"model": model, "prompt": f"row {at}", "max_tokens": 8, "temperature": 0,
                         "ignore_eos": True},
            }
            for at, model in enumerate(models)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.command("submit", path, "--id", job, "--priority", 10)

    def bodies(self, job: str) -> list[dict[str, Any]]:
        """The answers of an ended job, of which none may have failed."""
        until(lambda: self.store.job(job).status.ended, LONG_S)
        done = self.store.job(job)
        assert (done.status, done.failed) == (JobStatus.COMPLETED, 0)
        return [json.loads(row.line)["response"]["body"] for row in self.rows(job)]

    def rows(self, job: str) -> list[DoneRow]:
        """In input order."""
        rows = [row for chunk in self.store.results(job, limit=10_000) for row in chunk.rows()]
        return sorted(rows, key=lambda row: row.row)

    def sha256(self, name: str) -> str:
        return open_adapter(str(self.adapters / name), describe_base(str(self.base)), max_rank=64).sha256


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path, tiny_adapters: Path) -> Iterator[Site]:
    on_redis = getattr(request, "param", "sqlite") == "redis"
    url = request.getfixturevalue("redis_server").url if on_redis else f"sqlite:///{tmp_path}/jobs.db"
    (tmp_path / "adapters").mkdir()
    shutil.copytree(tiny_adapters / "one", tmp_path / "adapters" / "one")
    here = Site(url, tmp_path, tiny_base, uuid.uuid4().hex if on_redis else "loramill")
    yield here
    here.store.close()


def texts(bodies: list[dict[str, Any]]) -> list[str]:
    return [body["choices"][0]["text"] for body in bodies]


@pytest.mark.parametrize("site", ["sqlite", "redis"], indirect=True)
def test_adapters_come_change_and_go_under_load(
    site: Site, tiny_adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with site.working():
        # All the while there is something to do; what is asked for meanwhile comes first.
        site.occupy(shards=300)
        assert site.submit("base", ["tiny-base"] * 4) == 0
        assert site.submit("early", ["new"]) == 4, "nobody serves it yet"

        for version, source in enumerate(("two", "three"), 1):
            shutil.copytree(tiny_adapters / source, site.adapters / f"new-v{version}")
            assert site.command("adapters", "load", "new", f"new-v{version}") == 0
            assert site.submit(f"v{version}", ["new"] * 4) == 0
        answers = {job: site.bodies(job) for job in ("base", "v1", "v2")}
        for version in (1, 2):
            bodies = answers[f"v{version}"]
            assert {body["loramill"]["adapter_sha256"] for body in bodies} == {site.sha256(f"new-v{version}")}
            assert {body["loramill"]["mode"] for body in bodies} == {"dynamic"}
        for three in zip(*map(texts, answers.values()), strict=True):
            assert len(set(three)) == 3, "adapters were meant to change answers"

        assert site.command("adapters", "unload", "new") == 0
        assert site.submit("late", ["new"]) == 4
        assert "an operator has unloaded it" in capsys.readouterr().err
        assert site.command("adapters", "load", "new", "new-v1") == 0
        assert site.submit("again", ["new"] * 4) == 0
        assert texts(site.bodies("again")) == texts(answers["v1"])

        busy = site.store.job("load")
        assert busy.status is JobStatus.IN_PROGRESS, "the worker was meant to be busy to the end"
        assert site.command("cancel", "load") == 0
        until(lambda: site.store.job("load").status.ended, LONG_S)
        assert site.store.job("load").failed == 0
        for row in site.rows("load"):
            body = json.loads(row.line)["response"]["body"]
            expected = (None, site.sha256("one"))[row.row % 2 == 0]
            assert body.get("loramill", {}).get("adapter_sha256") == expected, "nobody else's rows were touched"
        # A worker says its counts every few seconds.
        until(lambda: site.store.workers()[0].stats["adapters"]["new"]["completed"] == 12, LONG_S)


def test_what_cannot_be_served_is_refused_with_its_reason_and_the_worker_goes_on(
    site: Site, make_adapter: Callable[..., Path], tiny_adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = make_adapter(site.adapters / "wide", rank=16)
    make_adapter(site.adapters / "still", noop=True)
    shutil.copytree(tiny_adapters / "two", site.adapters / "pickled")
    (site.adapters / "pickled" / "adapter_model.safetensors").rename(site.adapters / "pickled" / "adapter_model.bin")
    shutil.copytree(wide, site.adapters / "other")
    config = json.loads((tiny_adapters / "two" / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn"]
    (site.adapters / "other" / "adapter_config.json").write_text(json.dumps(config))
    hidden = site.adapters.rename(site.folder / "all")  # what is there at the start is found at the start
    shutil.copytree(hidden / "one", site.adapters / "one")
    with site.working():
        for name, why in {
            "wide": "rank 16 is over the limit of 8",
            "still": "it would change nothing",
            "pickled": "adapter_model.bin",
            "other": "target_modules",
            "absent": "no such folder",
        }.items():
            if name != "absent":
                shutil.copytree(hidden / name, site.adapters / name)
            assert site.command("adapters", "load", name) == 4
            assert why in capsys.readouterr().err
        [worker] = site.store.workers()
        assert set(worker.refused) == {"wide", "still", "pickled", "other", "absent"}
        assert worker.restarts == 0
        assert site.submit("j", ["one"] * 4) == 0
        assert {body["loramill"]["adapter_sha256"] for body in site.bodies("j")} == {site.sha256("one")}
