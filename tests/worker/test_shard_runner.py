"""The runner with an engine that answers at once or late, so that order, batching and cancelling can be seen."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loramill.schemas.names import Named, Names
from loramill.schemas.prompt import Limits, Prompter
from loramill.store.journal import DoneRow
from loramill.worker import shard_runner, twins
from loramill.worker.forecast import Forecast
from loramill.worker.request import Completion, FinishReason, Request, Result, TokenLogprob
from loramill.worker.shard_runner import Job, Shard, ShardRunner

NAMES = Names("base", {"sql": Named("abc123")})
JOB = Job("job", NAMES, defaults={"temperature": 0.5}, max_model_len=64, seed=7)


class EchoEngine:
    """Answers up to `max_num_seqs` rows each `passes` steps, each with its own prompt."""

    max_num_seqs = 2

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.passes = 1
        self.left = 0
        self.batches: list[list[int]] = []
        self.seen: list[Request] = []
        self.longest_queue = 0
        self.watched: list[Forecast] = []
        self.fails_on = -1
        self.completion: dict[str, Any] = {}

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.longest_queue = max(self.longest_queue, len(self.waiting))

    def watch(self, forecast: Forecast) -> None:
        self.watched.append(forecast)

    def unwatch(self, forecast: Forecast) -> None:
        self.watched.remove(forecast)

    def step(self, on_start: Any = None) -> list[Result]:
        if not self.running:
            now, self.waiting = self.waiting[: self.max_num_seqs], self.waiting[self.max_num_seqs :]
            self.running, self.left = now, self.passes
            self.seen += now
            self.batches.append([request.key for request in now])
            if on_start is not None:
                on_start(self.batches[-1])
        self.left -= 1
        if self.left:
            return []
        done, self.running = self.running, []
        return [self.answer(request) for request in done]

    def answer(self, request: Request) -> Result:
        if len(self.seen) == self.fails_on:
            return Result(request.key, len(request.prompt), [], error="the model's output was not finite")
        fields = {"token_ids": request.prompt, "finish_reason": FinishReason.LENGTH} | self.completion
        count = request.sampling.n
        return Result(request.key, len(request.prompt), [Completion(index, **fields) for index in range(count)])

    def cancel(self, keys: Any) -> None:
        self.running = [request for request in self.running if request.key not in keys]

    def cancel_waiting(self) -> list[int]:
        dropped, self.waiting = self.waiting, []
        return [request.key for request in dropped]


def native(number: int, **fields: Any) -> tuple[int, bytes]:
    return number, json.dumps({"id": f"r{number}", "prompt": [number % 250], "max_tokens": 4, **fields}).encode()


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def prompter(byte_tokenizer: Any) -> Prompter:
    return Prompter(byte_tokenizer, Limits(64, 258))


def run(
    engine: EchoEngine, prompter: Prompter, rows: list[tuple[int, bytes]], job: Job = JOB, **more: Any
) -> list[DoneRow]:
    done: list[DoneRow] = []
    runner = ShardRunner(engine, prompter)
    runner.submit(Shard(job, iter(rows), done.extend, **more))
    while runner.has_work:
        runner.step()
    return done


def body(row: DoneRow) -> dict[str, Any]:
    return json.loads(row.line)["response"]["body"]


def test_every_row_is_answered_once_under_its_number_and_started_in_the_given_order(engine, prompter) -> None:
    numbers = [5, 3, 900, 0, 4, 1, 2]
    done = run(engine, prompter, [native(number) for number in numbers])
    assert [request.prompt for request in engine.seen] == [[number % 250] for number in numbers]
    assert sorted(row.row for row in done) == sorted(numbers)
    for row in done:
        assert not row.failed
        assert json.loads(row.line)["custom_id"] == f"r{row.row}"
        assert (row.prompt_tokens, row.completion_tokens) == (1, 1)


def test_a_request_has_the_rows_sampling_the_defaults_and_the_adapters_hash(engine, prompter) -> None:
    run(engine, prompter, [native(0, adapter="sql", top_k=3, seed=11), native(1, temperature=0)])
    first, second = engine.seen
    assert (first.mix, second.mix) == ((("abc123", 1.0),), ())
    assert (first.sampling.temperature, first.sampling.top_k, first.sampling.seed) == (0.5, 3, 11)
    assert second.sampling.temperature == 0
    assert second.sampling.seed not in (0, 7)  # made from the run's seed and the row's id


def test_the_engine_knows_what_comes_until_it_has_come(engine, prompter, monkeypatch) -> None:
    monkeypatch.setattr(shard_runner, "FEED_ROWS", 4)
    forecast = Forecast(np.array([0] * 20 + [1] * 20, np.int32), [("a",), ("b",)])
    runner = ShardRunner(engine, prompter)
    runner.submit(Shard(JOB, iter([native(number) for number in range(40)]), lambda done: None, forecast=forecast))
    assert engine.watched == [forecast]
    assert forecast.next_use("b") == 20
    runner.step()
    assert forecast.next_use("b") == 20 - (len(engine.seen) + engine.num_waiting)
    while runner.has_work:
        runner.step()
    assert engine.watched == []
    again = Shard(JOB, iter([native(number) for number in range(40)]), lambda done: None, forecast=forecast)
    runner.submit(again)
    runner.cancel(again)
    assert engine.watched == []


def test_rows_are_read_as_they_are_needed(engine, prompter, monkeypatch) -> None:
    monkeypatch.setattr(shard_runner, "FEED_ROWS", 4)
    read = 0

    def rows() -> Iterator[tuple[int, bytes]]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield native(number)

    runner = ShardRunner(engine, prompter)
    runner.submit(Shard(JOB, rows(), lambda done: None))
    ahead = 0
    while runner.has_work:
        runner.step()
        ahead = max(ahead, read - len(engine.seen))
    assert len(engine.seen) == 1000
    assert ahead <= 12  # four for each place, and a batch
    assert engine.longest_queue <= 12


def test_long_lines_are_taken_fewer_at_a_time(engine, prompter, monkeypatch) -> None:
    monkeypatch.setattr(shard_runner, "FEED_BYTES", 100)
    monkeypatch.setattr(engine, "max_num_seqs", 100, raising=False)
    calls: list[int] = []
    encode = prompter.encode_rows
    monkeypatch.setattr(prompter, "encode_rows", lambda rows, a: calls.append(len(rows)) or encode(rows, a))
    run(engine, prompter, [native(number, user="x" * 60) for number in range(6)])
    assert calls == [1] * 6


def test_finished_rows_are_emitted_by_time_and_by_count(engine, prompter, monkeypatch) -> None:
    now = 0.0
    emitted: list[int] = []
    monkeypatch.setattr(shard_runner, "EMIT_ROWS", 10)
    runner = ShardRunner(engine, prompter, clock=lambda: now)
    runner.submit(Shard(JOB, iter([native(number) for number in range(100)]), lambda done: emitted.append(len(done))))
    for _ in range(5):
        runner.step()  # two rows each
    assert emitted == [10], "by count"
    runner.step()
    assert emitted == [10]
    now += 0.3
    runner.step()
    assert emitted == [10, 4], "by time"
    while runner.has_work:
        runner.step()
    assert sum(emitted) == 100


def test_a_line_that_cannot_be_run_is_an_error_line_and_the_others_run(engine, prompter) -> None:
    lines = [native(0), (1, b"{not json"), native(2, max_tokens=1000), native(3, adapter="sqll"), native(4)]
    done = {row.row: row for row in run(engine, prompter, lines)}
    codes = {number: body(row)["error"]["code"] for number, row in done.items() if row.failed}
    assert codes == {1: "invalid_json_line", 2: "token_limit_exceeded", 3: "model_not_found"}
    assert json.loads(done[2].line)["custom_id"] == "r2"
    assert json.loads(done[2].line)["response"]["status_code"] == 400
    assert not done[0].failed
    assert not done[4].failed


def test_an_engine_error_is_a_500_with_its_words(engine, prompter) -> None:
    engine.fails_on = 1
    (row,) = run(engine, prompter, [native(0)])
    assert row.failed
    line = json.loads(row.line)
    assert (line["custom_id"], line["response"]["status_code"], line["error"]) == ("r0", 500, None)
    assert body(row)["error"]["message"] == "the model's output was not finite"


def test_cancel_starts_no_further_row_and_finishes_those_in_flight(engine, prompter) -> None:
    kept: list[DoneRow] = []
    other: list[DoneRow] = []
    runner = ShardRunner(engine, prompter)
    first = Shard(JOB, iter([native(number) for number in range(50)]), kept.extend)
    runner.submit(first)
    runner.submit(Shard(JOB, iter([native(number) for number in range(5)]), other.extend))
    runner.step()
    started = len(engine.seen)
    runner.cancel(first)
    runner.cancel(first)
    while runner.has_work:
        runner.step()
    assert len(kept) + len(other) == len(engine.seen)
    assert len(kept) <= started
    assert sorted(row.row for row in other) == list(range(5)), "the other shard is not disturbed"


def test_cancel_now_drops_what_runs_and_emits_what_has_finished(engine, prompter) -> None:
    engine.passes = 2
    kept: list[DoneRow] = []
    other: list[DoneRow] = []
    runner = ShardRunner(engine, prompter)
    first = Shard(JOB, iter([native(number) for number in range(5)]), kept.extend)
    runner.submit(first)
    for _ in range(3):
        runner.step()  # two rows are finished, two run, one waits
    runner.submit(Shard(JOB, iter([native(number) for number in range(9)]), other.extend))
    runner.cancel(first, now=True)
    runner.emit_all()
    assert not runner.holds(first)
    while runner.has_work:
        runner.step()
    assert sorted(row.row for row in kept) == [0, 1]
    assert sorted(row.row for row in other) == list(range(9))


def test_rows_that_run_alone_do_so_after_the_others_with_nothing_beside_them(engine, prompter, monkeypatch) -> None:
    monkeypatch.setattr(shard_runner, "FEED_ROWS", 4)
    engine.passes = 2
    started: list[tuple[str, list[int], bool]] = []
    done: dict[str, list[DoneRow]] = {"a": [], "b": []}
    runner = ShardRunner(engine, prompter)
    for name, alone, count in (("a", {1, 3, 4}, 5), ("b", set(), 60)):
        runner.submit(
            Shard(
                JOB,
                iter([native(number) for number in range(count)]),
                done[name].extend,
                alone=alone,
                on_start=lambda rows, lone, name=name: started.append((name, rows, lone)),
            )
        )
    while runner.has_work:
        runner.step()
    assert {name: sorted(row.row for row in rows) for name, rows in done.items()} == {
        "a": list(range(5)), "b": list(range(60))
    }  # fmt: skip
    assert [(name, rows) for name, rows, lone in started if lone] == [("a", [1]), ("a", [3]), ("a", [4])]
    assert sum(len(rows) for _, rows, _ in started) == 65
    lone = [len(batch) for batch in engine.batches].index(1)
    assert [len(batch) for batch in engine.batches[lone : lone + 3]] == [1, 1, 1]
    assert started[-1][0] == "b", "the other shard goes on afterwards"


def test_a_cancelled_shard_runs_none_of_its_rows_alone(engine, prompter) -> None:
    done: list[DoneRow] = []
    runner = ShardRunner(engine, prompter)
    shard = Shard(JOB, iter([native(number) for number in range(3)]), done.extend, alone={2})
    runner.submit(shard)
    runner.step()
    runner.cancel(shard)
    while runner.has_work:
        runner.step()
    assert sorted(row.row for row in done) == [0, 1]


def test_two_shards_with_the_same_row_numbers_do_not_mix(engine, prompter) -> None:
    results: dict[str, list[DoneRow]] = {"a": [], "b": []}
    runner = ShardRunner(engine, prompter)
    for name, done in results.items():
        rows = [(n, json.dumps({"id": f"{name}{n}", "prompt": [n]}).encode()) for n in range(20)]
        runner.submit(Shard(JOB, iter(rows), done.extend))
    while runner.has_work:
        runner.step()
    for name, done in results.items():
        assert {json.loads(row.line)["custom_id"] for row in done} == {f"{name}{n}" for n in range(20)}


def text_ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_text_ends_before_the_stop_string_and_its_tokens(engine, prompter, byte_tokenizer) -> None:
    ids = text_ids("abc##d", byte_tokenizer)
    tokens = [TokenLogprob(token, -0.5, [(token, -0.5)]) for token in ids]
    engine.completion = {
        "token_ids": ids, "finish_reason": FinishReason.STOP, "stop_string": "##", "logprobs": tokens
    }  # fmt: skip
    (row,) = run(engine, prompter, [native(0, stop="##", logprobs=1, return_token_ids=True)])
    (choice,) = body(row)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
    assert choice["token_ids"] == ids
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert row.completion_tokens == 6


def test_the_text_lacks_the_token_that_ended_it(engine, prompter, byte_tokenizer) -> None:
    ids = text_ids("abX", byte_tokenizer)
    tokens = [TokenLogprob(token, -0.5, []) for token in ids]
    engine.completion = {"token_ids": ids, "finish_reason": FinishReason.STOP, "logprobs": tokens}
    (row,) = run(engine, prompter, [native(0, stop_token_ids=[ids[-1]], logprobs=0)])
    (choice,) = body(row)["choices"]
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["a", "b"]


def test_several_answers_are_several_choices(engine, prompter) -> None:
    (row,) = run(engine, prompter, [native(0, n=3)])
    assert [choice["index"] for choice in body(row)["choices"]] == [0, 1, 2]
    assert body(row)["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


GREEDY = {"prompt": [7], "temperature": 0}


def test_rows_that_must_come_to_the_same_answer_are_computed_once(engine, prompter, monkeypatch) -> None:
    monkeypatch.setattr(shard_runner, "FEED_ROWS", 3)
    rows = [native(n, **GREEDY, return_token_ids=n == 2, model="base" if n == 1 else None) for n in range(8)]
    done = {row.row: row for row in run(engine, prompter, rows)}
    assert len(engine.seen) == 1
    assert {json.loads(row.line)["custom_id"] for row in done.values()} == {f"r{number}" for number in range(8)}
    assert len({json.loads(row.line)["id"] for row in done.values()}) == 8
    assert {(row.prompt_tokens, row.completion_tokens) for row in done.values()} == {(1, 1)}
    assert body(done[1])["model"] == "base"
    assert [number for number in range(8) if "token_ids" in body(done[number])["choices"][0]] == [2]


@pytest.mark.parametrize(
    ("fields", "computed"),
    [
        ({"seed": 5}, 1),  # greedy: a seed decides nothing
        ({"temperature": 1}, 2),  # each row has a seed of its own
        ({"temperature": 1, "seed": 5}, 1),
        ([{"temperature": 1, "seed": 5}, {"temperature": 1, "seed": 6}], 2),
        ([{}, {"seed": 6}], 1),
        ([{}, {"adapter": "sql"}], 2),
        ([{}, {"adapter": "sql", "scale": 2}], 2),
        ([{}, {"max_tokens": 5}], 2),
        ([{}, {"stop_token_ids": [3]}], 2),
        ([{}, {"logit_bias": {"3": 1}}], 2),
        ([{}, {"logprobs": 1}], 2),
        ([{}, {"prompt": [7, 7]}], 2),
    ],
)
def test_what_decides_an_answer(engine, prompter, fields, computed) -> None:
    first, second = fields if isinstance(fields, list) else (fields, fields)
    done = run(engine, prompter, [native(0, **GREEDY | first), native(1, **GREEDY | second)])
    assert len(engine.seen) == computed
    assert len(done) == 2


def test_sharing_answers_can_be_switched_off(engine, prompter) -> None:
    run(engine, prompter, [native(number, **GREEDY) for number in range(5)], replace(JOB, dedupe=False))
    assert len(engine.seen) == 5


def test_rows_that_would_share_an_answer_share_a_failure(engine, prompter) -> None:
    engine.fails_on = 1
    done = run(engine, prompter, [native(number, **GREEDY) for number in range(3)])
    assert len(engine.seen) == 1
    assert [(row.failed, json.loads(row.line)["custom_id"]) for row in done] == [(True, f"r{n}") for n in range(3)]


def test_a_cancelled_row_takes_those_that_follow_it_along(engine, prompter) -> None:
    engine.passes = 3
    done: list[DoneRow] = []
    runner = ShardRunner(engine, prompter)
    shard = Shard(JOB, iter([native(number, **GREEDY) for number in range(9)]), done.extend)
    runner.submit(shard)
    runner.step()
    runner.cancel(shard, now=True)
    runner.emit_all()
    assert not runner.has_work
    assert done == []


def test_rows_without_a_place_in_the_engine_hold_up_no_pass_and_fill_no_memory(engine, prompter, monkeypatch) -> None:
    monkeypatch.setattr(shard_runner, "FEED_ROWS", 4)
    monkeypatch.setattr(shard_runner, "MAX_FOLLOWING", 40)
    engine.passes = 50
    read = 0

    def rows() -> Iterator[tuple[int, bytes]]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield native(number, **GREEDY)

    done: list[DoneRow] = []
    runner = ShardRunner(engine, prompter)
    runner.submit(Shard(JOB, rows(), done.extend))
    runner.step()
    assert read <= 12
    for _ in range(48):
        runner.step()
    assert 40 <= read <= 60
    while runner.has_work:
        before = read
        runner.step()
        assert read - before <= 12
    assert len(done) == 1000
    assert len(engine.seen) == 1


def test_answers_are_kept_up_to_a_number_of_tokens(engine, prompter, monkeypatch) -> None:
    monkeypatch.setattr(twins, "KEPT_TOKENS", 10 * (1 + twins.ROW_TOKENS))  # ten rows of a token
    monkeypatch.setattr(shard_runner, "FEED_ROWS", 1)
    order = [*range(8), 7, 0]
    rows = [native(100 + at, prompt=[prompt], temperature=0) for at, prompt in enumerate(order)]
    run(engine, prompter, rows)
    assert len(engine.seen) == 8
    order = [*range(20, 40), 39, 20]
    run(engine, prompter, [native(at, prompt=[prompt], temperature=0) for at, prompt in enumerate(order)])
    assert len(engine.seen) == 8 + 20 + 1


MIXED = Job(
    "job",
    Names(
        "base",
        {"sql": Named("s"), "chat": Named("c", 0.5, template="own {{ messages[0].content }}"), "twin": Named("s")},
        {"query": {"sql": 1.0}},
        {"task": {"sum": "chat"}},
    ),
    defaults={},
    max_model_len=64,
)


def test_rows_go_to_the_engine_as_mixes_of_contents(engine, prompter) -> None:
    mix = [{"name": "chat", "scale": 2}, {"name": "query", "scale": 0.5}, {"name": "twin"}]
    rows = [native(0, adapter="query"), native(1, adapters=mix), native(2, task="sum"), native(3, model="base")]
    done = {row.row: body(row) for row in run(engine, prompter, rows, MIXED)}
    assert [request.mix for request in engine.seen] == [(("s", 1.0),), (("c", 1.0), ("s", 1.5)), (("c", 0.5),), ()]
    assert [done[number]["model"] for number in range(4)] == ["query", "base", "base", "base"]
    assert done[0]["loramill"] == {"adapter": "sql", "adapter_sha256": "s", "mode": "dynamic"}
    assert done[2]["loramill"] == {"adapter": "chat", "adapter_sha256": "c", "mode": "dynamic", "scale": 0.5}
    assert done[3]["loramill"]["mode"] == "base"
    assert [one["name"] for one in done[1]["loramill"]["adapters"]] == ["chat", "sql", "twin"]
    assert done[1]["loramill"]["adapter"] is None


def test_a_mix_is_rendered_by_its_first_adapters_template(engine, prompter, byte_tokenizer) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "prompt": None}
    run(engine, prompter, [native(0, adapters=[{"name": "chat"}, {"name": "sql"}], **chat)], MIXED)
    assert engine.seen[0].prompt == text_ids("own hi", byte_tokenizer)


def test_what_is_served_statically_is_the_shards_to_say(engine, prompter) -> None:
    rows = [native(0, adapter="sql"), native(1, adapter="chat"), native(2)]
    done = {row.row: body(row) for row in run(engine, prompter, rows, MIXED, merged=lambda mix: mix[0][0] == "s")}
    assert [request.merged for request in engine.seen] == [True, False, False]
    assert [done[number]["loramill"]["mode"] for number in range(3)] == ["static", "dynamic", "base"]


def test_a_row_that_the_engine_does_not_take_fails_alone(engine, prompter, monkeypatch) -> None:
    add = engine.add

    def picky(request: Request) -> None:
        if request.mix:
            raise ValueError("adapter s is not registered with this engine")
        add(request)

    monkeypatch.setattr(engine, "add", picky)
    done = {row.row: row for row in run(engine, prompter, [native(0), native(1, adapter="sql"), native(2)])}
    assert [done[number].failed for number in range(3)] == [False, True, False]
    line = json.loads(done[1].line)
    assert (line["custom_id"], line["response"]["status_code"]) == ("r1", 500)
    assert body(done[1])["error"]["code"] == "engine_error"
