"""Real runs of the command: in this process where only its end matters, else as a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loramill.producer.cli import main


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.out)


class Desk:
    """A folder with an input file and the command that runs it."""

    def __init__(self, folder: Path, base: Path, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.base = base
        self.adapters = adapters
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"
        self.journal = folder / "out.jsonl.journal"
        self._capsys = capsys

    def write(self, rows: Iterable[dict[str, Any] | str]) -> None:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        self.input.write_text("".join(line + "\n" for line in lines))

    def arguments(self, *more: object, **instead: object) -> list[str]:
        flags: dict[str, object] = {
            "--input": self.input, "--output": self.output, "--base-model": self.base, "--adapters-dir": self.adapters,
            "--dtype": "float32", "--device": "cpu",
        }  # fmt: skip
        flags |= {"--" + name.replace("_", "-"): value for name, value in instead.items()}
        return ["run", *(str(part) for pair in flags.items() if pair[1] is not None for part in pair), *map(str, more)]

    def run(self, *more: object, **instead: object) -> Ended:
        """In this process. No line of it may be a traceback, and stdout is for data only."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(self.arguments(*more, **instead))
        said = self._capsys.readouterr()
        assert "Traceback" not in said.err
        if "--json" not in more:
            assert not said.out
        return Ended(int(ended.value.code or 0), said.out, said.err)

    def start(self, *more: object, before: str = "", **options: Any) -> subprocess.Popen[str]:
        """As a process; `before` is Python that runs in it first."""
        code = f"{before}\nfrom loramill.producer.cli import main\nmain({self.arguments(*more)!r})"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=options.pop("stdin", subprocess.DEVNULL), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, cwd=self.folder, **options,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str], timeout_s: float = 120) -> Ended:
        out, err = process.communicate(timeout=timeout_s)
        return Ended(process.returncode, out, err)

    def results(self, path: Path | None = None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (path or self.output).read_text().splitlines()]

    def files(self) -> set[str]:
        """What is in the folder beside the input."""
        return {entry.name for entry in self.folder.iterdir()} - {"in.jsonl"}


@pytest.fixture
def desk(tmp_path: Path, tiny_base: Path, tiny_adapters: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, tiny_base, tiny_adapters, capsys)


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """Native rows that go round the base and the three adapters."""

    def make(count: int, **fields: Any) -> list[dict[str, Any]]:
        names = (None, "one", "two", "three")
        shared = {"max_tokens": 6, "temperature": 0, **fields}
        return [
            {"id": f"r{number}", "adapter": names[number % 4], "prompt": f"row {number}", **shared}
            for number in range(count)
        ]

    return make
