"""Adapters that come, change and go under a worker process that is busy all the while, with a real model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.cli import main
from loramill.schemas.job import JobStatus
from loramill.store.opening import open_store
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
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--store", self.url, "--store-prefix", self.prefix])
        return int(ended.value.code or 0)

    def submit(self, job: str, models: list[str], tokens: int = 8) -> int:
        """A job of OpenAI's lines, one for each of `models`."""
        path = self.folder / f"{job}.jsonl"
        lines = [
            {
                "custom_id": f"{job}-{at}", "method": "POST", "url": "/v1/completions",
                "body": {"model": model, "prompt": f"row {at}", "max_tokens": tokens, "temperature": 0,
                         "ignore_eos": True},
            }
            for at, model in enumerate(models)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.command("submit", path, "--id", job)

    def bodies(self, job: str) -> list[dict[str, Any]]:
        """The answers of an ended job, of which none may have failed."""
        until(lambda: self.store.job(job).status.ended, LONG_S)
        done = self.store.job(job)
        assert (done.status, done.failed) == (JobStatus.COMPLETED, 0)
        chunks = self.store.results(job, limit=1000)
        rows = sorted((row for chunk in chunks for row in chunk.rows()), key=lambda row: row.row)
        return [json.loads(row.line)["response"]["body"] for row in rows]

    def sha256(self, name: str) -> str:
        return open_adapter(str(self.adapters / name), describe_base(str(self.base)), max_rank=64).sha256


@pytest.fixture(params=["sqlite", "redis"])
def site(request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path, tiny_adapters: Path) -> Iterator[Site]:
    on_redis = request.param == "redis"
    url = request.getfixturevalue("redis_server").url if on_redis else f"sqlite:///{tmp_path}/jobs.db"
    (tmp_path / "adapters").mkdir()
    shutil.copytree(tiny_adapters / "one", tmp_path / "adapters" / "one")
    here = Site(url, tmp_path, tiny_base, uuid.uuid4().hex if on_redis else "loramill")
    yield here
    here.store.close()


@contextmanager
def load(site: Site) -> Iterator[list[str]]:
    """Jobs of the base and of `one`, all the while; their ids."""
    over, jobs = threading.Event(), list[str]()

    def submit() -> None:
        while not over.is_set():
            if not jobs or site.store.job(jobs[-1]).status.ended:
                assert site.submit(f"load-{len(jobs)}", ["one", "tiny-base"] * 40, tokens=40) == 0
                jobs.append(f"load-{len(jobs)}")
            time.sleep(0.05)

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield jobs
    finally:
        over.set()
        thread.join()


def texts(bodies: list[dict[str, Any]]) -> list[str]:
    return [body["choices"][0]["text"] for body in bodies]


def test_adapters_come_change_and_go_under_load(
    site: Site, tiny_adapters: Path, make_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with site.working(), load(site) as jobs:
        assert site.submit("base", ["tiny-base"] * 4) == 0
        assert site.submit("early", ["new"]) == 4, "nobody serves it yet"

        shutil.copytree(tiny_adapters / "two", site.adapters / "new")
        assert site.command("adapters", "load", "new") == 0
        first = site.sha256("new")
        assert site.submit("first", ["new"] * 4) == 0

        shutil.rmtree(site.adapters / "new")
        shutil.copytree(tiny_adapters / "three", site.adapters / "new")
        assert site.command("adapters", "load", "new") == 0
        second = site.sha256("new")
        assert first != second
        assert site.submit("second", ["new"] * 4) == 0

        answers = {job: site.bodies(job) for job in ("base", "second")}
        assert {body["loramill"]["adapter_sha256"] for body in answers["second"]} == {second}
        assert all(body["loramill"]["mode"] == "dynamic" for body in answers["second"])
        # The files of the former are gone: its rows were answered by it, or failed by name, and never by another.
        until(lambda: site.store.job("first").status.ended, LONG_S)
        if not site.store.job("first").failed:
            answers["first"] = site.bodies("first")
            assert {body["loramill"]["adapter_sha256"] for body in answers["first"]} == {first}
        said = [text for bodies in answers.values() for text in texts(bodies)]
        assert len(set(said)) == len(said), "adapters were meant to change answers"

        assert site.command("adapters", "unload", "new") == 0
        assert site.submit("late", ["new"]) == 4
        assert "an operator has unloaded it" in capsys.readouterr().err
        assert site.command("adapters", "load", "new") == 0
        assert site.submit("again", ["new"] * 4) == 0
        assert texts(site.bodies("again")) == texts(answers["second"])
    assert len(jobs) > 1
    one = site.sha256("one")
    for job in jobs:
        if site.store.job(job).status.ended:
            hashes = [body.get("loramill", {}).get("adapter_sha256") for body in site.bodies(job)]
            assert hashes == [one, None] * 40, "and nobody else's rows were touched"


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
            "other": "no place",
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
