"""The engine child as its worker sees it: a process of its own, with frames over pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from loramill.schemas.job import JobNames, JobSpec, Pinned
from loramill.schemas.manifest import Manifest
from loramill.store.packing import Chunk, pack_shard
from loramill.store.records import DoneRow
from loramill.worker.frames import Frame, Kind, read_frame, write_frame
from loramill.worker.settings import ModelOptions
from loramill.worker.specs import AdapterSpec
from tests import stub_engine

REPO = Path(__file__).parents[2]
STUB = (sys.executable, "-m", "tests.stub_engine")
REAL = (sys.executable, "-m", "loramill.worker.child")
OPTIONS = ModelOptions(base_model="stub")


class Child:
    """A child process, spoken to as the worker does."""

    def __init__(self, command: tuple[str, ...] = STUB, options: ModelOptions = OPTIONS, **environ: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO, env={**os.environ, **environ}
        )
        self.frames: list[Frame] = []
        self.send(Kind.SETTINGS, **{one.name: getattr(options, one.name) for one in fields(options)})

    def send(self, kind: Kind, blob: bytes = b"", **said: Any) -> None:
        assert self.process.stdin is not None
        write_frame(self.process.stdin, kind, blob, **said)

    def until(self, *kinds: Kind) -> Frame:
        """The next frame of one of these kinds; those before it are kept as well."""
        assert self.process.stdout is not None
        while (frame := read_frame(self.process.stdout)) is not None:
            self.frames.append(frame)
            if frame.kind in kinds:
                return frame
        raise AssertionError(f"the child ended with {self.process.wait()}")

    def of(self, kind: Kind) -> list[Frame]:
        return [frame for frame in self.frames if frame.kind is kind]

    def submit(self, key: int, lines: list[dict[str, Any]], **said: Any) -> None:
        rows = [(100 + at, json.dumps(line).encode()) for at, line in enumerate(lines)]
        self.send(Kind.SHARD, pack_shard(rows), **{"key": key, "job": "job", "skip": "", "alone": []} | said)

    def rows(self, key: int) -> dict[int, DoneRow]:
        """By position, of all frames so far."""
        chunks = [Chunk.from_bytes(frame.blob) for frame in self.of(Kind.ROWS) if frame.fields["key"] == key]
        return {int(at): row for c in chunks for at, row in zip(c.index["position"], c.rows(), strict=True)}


Start = Callable[..., Child]


@pytest.fixture
def start() -> Iterator[Start]:
    begun: list[Child] = []

    def start(*args: Any, **more: Any) -> Child:
        begun.append(Child(*args, **more))
        return begun[-1]

    yield start
    for child in begun:
        child.process.kill()
        child.process.wait()
        for pipe in (child.process.stdin, child.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def job(**names: Any) -> dict[str, Any]:
    spec = JobSpec(id="job", base_id="any", names=JobNames(base="stub", **names))
    return {"spec": spec.model_dump(mode="json")}


def line(number: int, text: str = "", **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": text or f"r{number}", "temperature": 0, **more}


def text_of(row: DoneRow) -> str:
    return str(json.loads(row.line)["response"]["body"]["choices"][0]["text"])


def error_of(row: DoneRow) -> str:
    return str(json.loads(row.line)["response"]["body"]["error"]["code"])


@pytest.fixture
def stub(start: Start) -> Child:
    child = start()
    child.until(Kind.READY)
    child.send(Kind.JOB, **job(adapters={"sql": Pinned(key="key-03", scale=0.5), "gone": Pinned(key="nobody")}))
    return child


def test_it_says_what_it_serves_and_then_that_it_is_ready(start: Start) -> None:
    child = start()
    ready = child.until(Kind.READY)
    assert ready.fields == {"device": "stub", "resident": [], "max_num_seqs": stub_engine.SEQS}
    *blobs, manifest, _ = child.frames
    offered = Manifest.model_validate(manifest.fields["manifest"])
    assert offered == stub_engine.manifest()[0]
    assert {frame.fields["sha"]: frame.blob for frame in blobs} == stub_engine.manifest()[1]


def test_the_stubs_tokenizer_is_the_one_that_its_files_make(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in stub_engine.TOKENIZER_FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), stub_engine.ByteTokenizer()
    texts = ["so it's  12 ok", "Grüße\n\t日本", ""]
    assert theirs(texts)["input_ids"] == ours(texts)["input_ids"]
    assert theirs.eos_token_id == ours.eos_token_id
    assert theirs.get_vocab() == ours.get_vocab()
    chat = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == ours.apply_chat_template(chat)


def test_a_shards_rows_come_once_each_under_their_positions(stub: Child) -> None:
    lines = [line(0), line(1, model="sql"), {"id": "r2"}, line(3), line(4)]
    stub.submit(7, lines, skip="08")  # position 4
    assert stub.until(Kind.END).fields == {"key": 7}
    rows = stub.rows(7)
    assert {at: row.row for at, row in rows.items()} == {0: 100, 1: 101, 2: 102, 3: 103}
    assert [text_of(rows[at]) for at in (0, 1, 3)] == ["ok:r0", "ok:r1", "ok:r3"]
    assert error_of(rows[2]) == "invalid_request"
    assert json.loads(rows[1].line)["response"]["body"]["loramill"]["scale"] == 0.5
    (running,) = stub.of(Kind.RUNNING)
    assert running.fields == {"started": [[7, 0], [7, 1], [7, 3]], "alone": False}
    assert stub.frames.index(running) < stub.frames.index(stub.of(Kind.ROWS)[0])


def test_an_adapter_that_it_does_not_have_is_not_the_base(stub: Child) -> None:
    stub.submit(1, [line(0, model="gone"), line(1)])
    stub.until(Kind.END)
    assert error_of(stub.rows(1)[0]) == "adapter_unavailable"
    assert not stub.rows(1)[1].failed


def test_it_beats_busy_or_not_and_says_what_is_resident(stub: Child) -> None:
    first = stub.until(Kind.BEAT).fields
    assert (first["steps"], first["busy"]) == (0, False)
    stub.submit(1, [line(0, "SLOW", model="sql")])
    beats = [stub.until(Kind.BEAT).fields for _ in range(2)]
    assert beats[-1]["busy"]
    assert beats[-1]["steps"] > beats[-2]["steps"] > 0
    assert beats[-1]["resident"] == ["key-03"]
    assert beats[-1]["stats"]["steps"] == beats[-1]["steps"]


def test_stop_finishes_what_runs_and_stop_now_does_not(start: Start) -> None:
    child = start(STUB_SEQS="2", STUB_STEP_S="0.01")
    child.until(Kind.READY)
    child.send(Kind.JOB, **job())
    child.submit(1, [line(0, "SLOW0"), *(line(at) for at in range(1, 400))])
    child.until(Kind.ROWS)
    child.submit(2, [line(0, "SLOW2")])
    child.send(Kind.STOP, key=1, now=False)
    assert child.until(Kind.END).fields == {"key": 1}
    assert "ok:SLOW0" in {text_of(row) for row in child.rows(1).values()}
    assert len(child.rows(1)) < 400
    began_s = time.monotonic()
    child.send(Kind.STOP, key=2, now=True)
    assert child.until(Kind.END).fields == {"key": 2}
    assert time.monotonic() - began_s < 2
    assert child.rows(2) == {}
    child.submit(2, [line(5)])  # the key may be used again
    child.until(Kind.END)
    assert text_of(child.rows(2)[0]) == "ok:r5"


def test_rows_that_run_alone_are_named_as_alone(stub: Child) -> None:
    stub.submit(1, [line(at) for at in range(5)], alone=[0, 3])
    stub.until(Kind.END)
    assert [(frame.fields["started"], frame.fields["alone"]) for frame in stub.of(Kind.RUNNING)] == [
        ([[1, 1], [1, 2], [1, 4]], False), ([[1, 0]], True), ([[1, 3]], True)
    ]  # fmt: skip


def test_rows_that_run_out_of_memory_in_company_do_not_fail(stub: Child) -> None:
    stub.submit(1, [line(0), line(1, "OOM"), line(2, "OOM1"), *(line(at) for at in range(3, 20))])
    stub.until(Kind.END)
    rows = stub.rows(1)
    assert len(rows) == 20
    assert {at: error_of(row) for at, row in rows.items() if row.failed} == {2: "out_of_memory"}


def test_identical_rows_run_once_unless_the_job_says_otherwise(stub: Child) -> None:
    stub.submit(1, [line(at, "same") for at in range(5)])
    stub.until(Kind.END)
    assert stub.of(Kind.RUNNING)[0].fields["started"] == [[1, 0]]
    assert {json.loads(row.line)["custom_id"] for row in stub.rows(1).values()} == {f"r{at}" for at in range(5)}
    spec = JobSpec(id="each", base_id="any", names=JobNames(base="stub"), dedupe=False)
    stub.send(Kind.JOB, spec=spec.model_dump(mode="json"))
    stub.submit(2, [line(at, "same") for at in range(5)], job="each")
    stub.until(Kind.END)
    assert len(stub.of(Kind.RUNNING)[1].fields["started"]) == 5


def test_a_row_that_kills_it_was_named_before(stub: Child) -> None:
    stub.submit(1, [line(0), line(1, "ABORT")])
    with pytest.raises(AssertionError, match=f"ended with {-signal.SIGABRT}"):
        stub.until(Kind.END)
    assert stub.of(Kind.RUNNING)[-1].fields["started"] == [[1, 0], [1, 1]]


def test_a_pass_that_hangs_stops_the_beats(stub: Child) -> None:
    stub.submit(1, [line(0, "HANG")])
    stub.until(Kind.RUNNING)
    os.set_blocking(stub.process.stdout.fileno(), False)  # type: ignore[union-attr]
    time.sleep(2.5)
    assert stub.process.stdout.read() is None  # type: ignore[union-attr]
    assert stub.process.poll() is None


@pytest.mark.parametrize("amid", [False, True])
def test_it_ends_with_its_input(stub: Child, amid: bool) -> None:
    if amid:
        stub.submit(1, [line(0, "HANG")])
        stub.until(Kind.RUNNING)
    assert stub.process.stdin is not None
    stub.process.stdin.close()
    assert stub.process.wait(5) == 0


def test_what_is_no_frame_ends_it(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    child = start()
    child.until(Kind.READY)
    assert child.process.stdin is not None
    child.process.stdin.write(b"\xff" * 16)
    child.process.stdin.flush()
    assert child.process.wait(5) == 1
    assert "not a frame" in capfd.readouterr().err


def test_what_others_print_is_no_frame(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    script = "from tests import stub_engine as s; from loramill.worker import child\n" + textwrap.dedent(
        """
        import os
        def noisy(options):
            print("a banner", flush=True)
            os.system("echo from a process; cat")  # which finds nothing to read
            return s.open_stub(options)
        child.main(noisy)
        """
    )
    child = start((sys.executable, "-c", script))
    assert child.until(Kind.READY).fields["device"] == "stub"
    assert "a banner" in capfd.readouterr().err


def test_signals_are_its_workers_to_act_on(stub: Child) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        stub.process.send_signal(signum)
    stub.submit(1, [line(0)])
    assert stub.until(Kind.END).fields == {"key": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it on Linux alone")
def test_it_dies_with_its_parent_though_the_input_stays_open(tmp_path: Path) -> None:
    """A grandchild here: what holds its pipe's other end is this test, not the parent that is killed."""
    parent = textwrap.dedent(
        """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-m", "tests.stub_engine"], stdin=0)
        print(child.pid, file=sys.stderr, flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    pid = int(process.stderr.readline())
    write_frame(process.stdin, Kind.SETTINGS, **{one.name: getattr(OPTIONS, one.name) for one in fields(OPTIONS)})
    while (frame := read_frame(process.stdout)) is not None and frame.kind is not Kind.READY:
        pass
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not _alive(pid)
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_base_that_cannot_be_opened_is_said_in_its_words(start: Start, tmp_path: Path) -> None:
    child = start(REAL, ModelOptions(base_model=str(tmp_path)))
    fatal = child.until(Kind.FATAL).fields
    assert fatal["code"] == 4
    assert str(tmp_path) in fatal["lines"][0]
    assert child.process.wait(10) == 4


@pytest.fixture(scope="module")
def job_lines() -> list[dict[str, Any]]:
    chat = [{"role": "user", "content": "hi"}]
    lines = [
        {"id": f"r{number}", "prompt": f"row {number % 9}", "temperature": 0, "max_tokens": 6, "adapter": name}
        for number, name in enumerate((None, "one", "two", "three", "half") * 5)
    ]
    return [
        *lines,
        {"id": "chat", "messages": chat, "max_tokens": 5, "temperature": 0.7, "adapter": "two"},
        {"id": "seeded", "prompt": "seed", "max_tokens": 5, "temperature": 0.9, "seed": 3, "n": 2},
        {"id": "mix", "prompt": "m", "max_tokens": 4, "adapters": [{"name": "one", "scale": 0.5}, {"name": "two"}]},
        {"id": "alone", "prompt": "m", "max_tokens": 4, "temperature": 0, "adapter": "dora"},
        {"id": "alias", "prompt": "m", "max_tokens": 4, "temperature": 0, "model": "query"},
        {"id": "grown", "messages": chat, "max_tokens": 5, "temperature": 0, "adapter": "tool"},
    ]


@pytest.fixture(scope="module")
def served(
    tiny_base: Path,
    tiny_adapters: Path,
    make_adapter: Callable[..., Path],
    make_grown: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ModelOptions:
    root = tmp_path_factory.mktemp("served")
    names = root / "names.json"
    names.write_text('{"aliases": {"query": "three"}}')
    specs = {"half": AdapterSpec(str(tiny_adapters / "one"), scale=0.5)}
    specs["dora"] = AdapterSpec(str(make_adapter(root / "dora", seed=9, use_dora=True)))
    specs["tool"] = AdapterSpec(str(make_grown(root / "tool")))
    return ModelOptions(
        base_model=str(tiny_base), adapters=specs, adapters_dir=tiny_adapters, adapters_file=names, dtype="float32",
        device="cpu", max_loras_per_batch=2, max_num_seqs=8, kv_cache_memory=2**24, seed=11,
    )  # fmt: skip


def test_its_answers_are_those_of_loramill_run(
    start: Start, served: ModelOptions, job_lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    job_file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    job_file.write_text("".join(json.dumps(one) + "\n" for one in job_lines))
    arguments = ["run", "--input", job_file, "--output", output, "--base-model", served.base_model]
    arguments += ["--adapters-dir", served.adapters_dir, "--adapters-file", served.adapters_file]
    arguments += ["--adapter", f"half={served.adapters['half'].text}*0.5"]
    arguments += [word for name in ("dora", "tool") for word in ("--adapter", f"{name}={served.adapters[name].text}")]
    arguments += ["--dtype", "float32", "--device", "cpu", "--max-loras-per-batch", "2", "--seed", "11", "--quiet"]
    command = [sys.executable, "-c", "from loramill.producer.cli import main; main()", *map(str, arguments)]
    subprocess.run(command, check=True)
    expected = {one["custom_id"]: body_of(one) for one in map(json.loads, output.read_text().splitlines())}

    child = start(REAL, served)
    child.until(Kind.READY)
    manifest = Manifest.model_validate(child.of(Kind.MANIFEST)[0].fields["manifest"])
    assert {file for files in manifest.tokenizers.values() for file in files.values()} == {
        frame.fields["sha"] for frame in child.of(Kind.BLOB)
    }
    pinned = {offer.name: Pinned(key=offer.key, scale=offer.scale) for offer in manifest.adapters}
    names = JobNames(base=manifest.base, adapters=pinned, aliases=manifest.aliases)
    spec = JobSpec(id="job", base_id=manifest.base_id, names=names, seed=11)
    child.send(Kind.JOB, spec=spec.model_dump(mode="json"))
    half = len(job_lines) // 2
    child.submit(1, job_lines[:half], alone=[2])
    child.submit(2, job_lines[half:])
    for _ in range(2):
        child.until(Kind.END)
    lines = [json.loads(row.line) for key in (1, 2) for row in child.rows(key).values()]
    got = {one["custom_id"]: body_of(one) for one in lines}
    for name in ("dora", "tool"):
        assert {body["loramill"]["mode"] for body in got.values() if body["loramill"]["adapter"] == name} == {"static"}
    # The run may have merged what can be served either way.
    for body in (*expected.values(), *got.values()):
        del body["loramill"]["mode"]
    assert got == expected
    child.until(Kind.BEAT)
    beat = child.until(Kind.BEAT).fields
    assert not beat["busy"]
    assert beat["resident"]
    assert set(beat["resident"]) <= {offer.key for offer in manifest.adapters}


def body_of(result: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = result["response"]["body"]
    return {name: value for name, value in body.items() if name not in ("id", "created")}
