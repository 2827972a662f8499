from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from loramill.producer import validate as validate_module
from loramill.producer.index import MAX_SHOWN, Index
from loramill.producer.job_plan import AdapterFacts, Draft
from loramill.producer.reader import open_input
from loramill.producer.validate import validate
from loramill.schemas.errors import LineError
from loramill.schemas.names import Named, Names
from loramill.schemas.prompt import Limits, Prompter
from loramill.schemas.request import parse_line

ADAPTERS = ["sql", "chat"]
NAMES = Names("tiny", {name: Named(name) for name in ADAPTERS})
Heard = list[tuple[int, int, str, str | None]]


class Bench:
    """Validates lines of a file in a temporary folder, with a context of 40 tokens and 258 of vocabulary."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.path = folder / "jobs.jsonl"
        self.prompter = Prompter(tokenizer, Limits(max_model_len=40, vocab_size=258), chat_template="{{ messages }}")
        self.names = NAMES
        self.heard: Heard = []
        self.progress: list[int] = []

    def run(self, lines: list[Any], **options: Any) -> Index:
        raw = [line if isinstance(line, bytes) else orjson.dumps(line) for line in lines]
        self.path.write_bytes(b"\n".join(raw) + b"\n")
        self.heard, self.progress = [], []

        def hear(row: int, line: int, error: LineError) -> None:
            self.heard.append((row, line, error.code, error.custom_id))

        with open_input(str(self.path), str(self.path.parent)) as source:
            index = validate(
                source,
                self.prompter,
                names=self.names,
                max_mix=2,
                on_invalid=hear,
                on_progress=self.progress.append,
                **options,
            )
            for offset, length in zip(index.offset, index.length, strict=True):
                parse_line(source.read(int(offset), int(length)), self.names.route_fields)
            return index


@pytest.fixture
def bench(tmp_path: Path, byte_tokenizer: Any) -> Bench:
    return Bench(tmp_path, byte_tokenizer)


def line(name: Any, **fields: Any) -> dict[str, Any]:
    return {"id": name, "prompt": "abc"} | fields


def test_columns(bench: Bench) -> None:
    chat = {"model": "base:chat", "messages": [{"role": "user", "content": ""}]}
    body = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    index = bench.run([line("a", adapter="sql", n=3), b"", line("b", max_tokens=7), b"{", line("d", prompt=[1] * 40)])
    assert index.row.tolist() == [0, 1]
    assert (index.mix.tolist(), index.mixes) == ([0, -1], [(("sql", 1.0),)])
    assert index.prompt_tokens.tolist() == [4, 4]
    assert index.max_tokens.tolist() == [16, 7]
    assert index.n.tolist() == [3, 1]
    assert index.cost.tolist() == [4 + 48, 4 + 7]
    assert (len(index), index.total_rows, index.problem_count) == (2, 4, 2)
    assert bench.progress[-1] == 4
    bench.prompter = Prompter(bench.prompter._tokenizer, bench.prompter.limits, chat_template="12345")
    index = bench.run([line("a"), body])
    assert (index.mix.tolist(), index.mixes) == ([-1, 0], [(("chat", 1.0),)])
    assert index.max_tokens.tolist() == [16, 35]


def test_all_problems_are_reported_by_line(bench: Bench) -> None:
    lines: list[Any] = [
        line("dup"),
        b"{",
        line("fine"),
        line("long", max_tokens=37),
        line("who", adapter="sqll"),
        line("dup"),
        line("hot", temperature=9),
        line("ids", prompt=[258]),
        line("stops", stop_token_ids=[3, 258]),
        line("bias", logit_bias={"258": 1}),
        line("full", prompt="x" * 39),
        line("room", prompt="x" * 38),
    ]
    index = bench.run(lines)
    assert index.row.tolist() == [0, 2, 11]
    assert index.max_tokens.tolist() == [16, 16, 1]
    assert [(problem.line, problem.code, problem.param, problem.custom_id) for problem in index.problems] == [
        (2, "invalid_json_line", None, None),
        (4, "token_limit_exceeded", "max_tokens", "long"),
        (5, "model_not_found", "model", "who"),
        (6, "duplicate_custom_id", "custom_id", "dup"),
        (7, "invalid_request", "temperature", "hot"),
        (8, "invalid_request", "prompt", "ids"),
        (9, "invalid_request", "stop_token_ids", "stops"),
        (10, "invalid_request", "logit_bias", "bias"),
        (11, "token_limit_exceeded", "prompt", "full"),
    ]
    assert index.problem_count == 9
    assert sorted(bench.heard) == [(p.line - 1, p.line, p.code, p.custom_id) for p in index.problems]
    assert index.problems[3].render("jobs.jsonl") == "jobs.jsonl:6: custom_id: the same custom_id is on line 1"
    assert index.problems[0].render("jobs.jsonl").startswith("jobs.jsonl:2: the line is not JSON")
    assert "did you mean `sql`" in index.problems[2].message


def test_a_problem_is_one_harmless_line(bench: Bench) -> None:
    index = bench.run([line("a", **{"x\n\x1b[2Jé": 1})])
    assert index.problems[0].render("in") == r"in:1: x\n\x1b[2Jé: unknown field `x\n\x1b[2Jé`"


def test_the_first_hundred_are_shown_and_all_are_counted(bench: Bench) -> None:
    lines: list[Any] = [line("same")]
    for number in range(1500):
        # Three kinds that are found at different times: while parsing, while tokenizing, at the end.
        lines += [line(f"a{number}", n=0), line(f"b{number}", max_tokens=100), line("same")]
    index = bench.run(lines)
    assert (len(index), index.total_rows, index.problem_count) == (1, 4501, 4500)
    assert [problem.line for problem in index.problems] == list(range(2, 2 + MAX_SHOWN))
    assert sorted(row for row, *_ in bench.heard) == list(range(1, 4501))


def test_duplicates_of_every_form(bench: Bench) -> None:
    openai = {"custom_id": "7", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}}
    lines = [line("bad", n=0), line(7), openai, line("bad"), line("7"), b'{"id":"b\\u0061d","prompt":"p"}', line("BAD")]
    lines.append(line("7", n=0))  # invalid as it is: told once
    index = bench.run(lines)
    assert (index.row.tolist(), index.problem_count) == ([1, 6], 6)
    assert [(p.line, p.message) for p in index.problems if p.code == "duplicate_custom_id"] == [
        (3, "the same custom_id is on line 2"),
        (4, "the same custom_id is on line 1"),
        (5, "the same custom_id is on line 2"),
        (6, "the same custom_id is on line 1"),
    ]


def test_equal_hashes_are_not_duplicates(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_module, "hash", lambda custom_id: len(custom_id), raising=False)
    names = ["aa", "bb", "c", "aa", "dd", "c", "", "bb"]
    index = bench.run([line(name) for name in names])
    assert index.row.tolist() == [0, 1, 2, 4]
    assert [(p.line, p.code, p.custom_id) for p in index.problems] == [
        (4, "duplicate_custom_id", "aa"),
        (6, "duplicate_custom_id", "c"),
        (7, "invalid_request", ""),
        (8, "duplicate_custom_id", "bb"),
    ]


def test_max_rows(bench: Bench) -> None:
    lines = [line("a"), b"{", line("b"), line("a"), b"{"]
    index = bench.run(lines, max_rows=3)
    assert (index.row.tolist(), index.total_rows, index.problem_count) == ([0, 2], 3, 1)
    assert bench.run(lines, max_rows=99).problem_count == 3


def test_over_the_line_cap_is_one_bad_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramill.producer import reader
    from loramill.schemas import request

    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 64)
    monkeypatch.setattr(request, "MAX_LINE_BYTES", 64)
    index = bench.run([line("a"), line("b", prompt="x" * 5000), line("c")])
    assert index.row.tolist() == [0, 2]
    assert (index.problems[0].line, index.problems[0].code) == (2, "invalid_json_line")


def test_a_batch_boundary_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(number, prompt="x" * (1 + number % 30), adapter=ADAPTERS[number % 2]) for number in range(50)]
    whole = bench.run(lines)
    monkeypatch.setattr(validate_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(validate_module, "_BATCH_BYTES", 300)
    parts = bench.run(lines)
    assert len(bench.progress) > 5 and bench.progress == sorted(bench.progress)
    for column in ("row", "offset", "length", "mix", "prompt_tokens", "prompt_hash", "max_tokens", "n"):
        np.testing.assert_array_equal(getattr(whole, column), getattr(parts, column))


def test_equal_prompts_have_equal_hashes_whatever_else_differs(bench: Bench) -> None:
    index = bench.run([line("a"), line("b", adapter="sql", n=2), line("c", prompt="abd"), line("d", prompt=[1, 2])])
    assert index.prompt_hash[0] == index.prompt_hash[1]
    assert len(set(index.prompt_hash.tolist())) == 3


def test_mixes_are_numbered_as_they_come(bench: Bench) -> None:
    bench.names = Names(
        "tiny", NAMES.adapters, {"ab": {"sql": 1, "chat": 1}, "query": {"sql": 1}}, {"task": {"x": "chat"}}
    )
    mix = [{"name": "chat", "scale": 0.5}, {"name": "query"}]
    rows = [{"adapter": "query"}, {"adapters": mix}, {}, {"adapter": "sql"}, {"adapter": "sql", "scale": 2},
            {"task": "x"}, {"adapters": [{"name": "sql", "scale": 2}]}]  # fmt: skip
    index = bench.run([line(number, **fields) for number, fields in enumerate(rows)])
    assert index.mix.tolist() == [0, 1, -1, 0, 2, 3, 2]
    assert index.mixes == [(("sql", 1.0),), (("chat", 0.5), ("sql", 1.0)), (("sql", 2.0),), (("chat", 1.0),)]
    assert index.adapters == ["sql", "chat"]
    index = bench.run([line("x", adapter="chat", max_tokens=99), line("y", adapter="sql")])
    assert index.adapters == ["sql"], "of the valid rows only"


def test_mixes_that_cannot_be_are_reported_with_their_line(bench: Bench) -> None:
    bench.names = Names("tiny", {name: Named(name) for name in ("a", "b", "c")} | {"a2": Named("a")})
    three = [{"name": name} for name in "abc"]
    lines = [line(0, adapters=three), line(1, scale=2), line(2, adapters=[*three[:2], {"name": "a2"}])]
    index = bench.run([*lines, line(3, adapters=[{"name": "a"}, {"name": "d"}]), line(4, adapters=three[:2])])
    assert [(p.line, p.param) for p in index.problems] == [(1, "adapters"), (2, "scale"), (4, "adapters.1.name")]
    assert "a mix of 3 adapters; --max-loras-per-batch allows 2" in index.problems[0].message
    assert index.row.tolist() == [2, 4], "two names of one content are one adapter"


def test_index_feeds_the_plan(bench: Bench) -> None:
    index = bench.run([line(number, adapter=ADAPTERS[number % 2], max_tokens=1 + number) for number in range(6)])
    facts = {named.sha256: AdapterFacts(8, static_only=False) for named in bench.names.adapters.values()}
    draft = Draft(index, np.arange(len(index)), bench.names, facts)
    made = draft.plan(
        slots=1,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_loaded_loras=None,
        pinned=frozenset(),
        mode="dynamic",
        order="throughput",
        costs=None,
        decided={},
    )
    assert index.row[made.order].tolist() == [4, 2, 0, 5, 3, 1]


def test_a_million_rows_take_little_memory(tmp_path: Path) -> None:
    # Measured: 85 MB above the imports, and 18 MB for a tenth of the rows.
    program = Path(__file__).with_name("measure_validate.py")
    command = [sys.executable, str(program), "1000000", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=600)
    report = orjson.loads(done.stdout)
    assert report["rows"] == 1_000_000
    assert report["growth_mb"] < 300
