"""The engine's promises beyond parity: endings, several answers, repeatable draws, a small cache, poisoned rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramill.worker import room
from loramill.worker.engine import Engine
from loramill.worker.model import ModelError
from loramill.worker.request import FinishReason, Request, Result, Sampling, plain

Answer = Callable[[Engine, list[Request]], dict[int, Result]]
Make = Callable[..., Engine]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 97) for _ in range(draw.randint(1, 40))] for _ in range(count)]


def tokens(results: dict[int, Result]) -> dict[int, list[list[int]]]:
    return {key: [c.token_ids for c in result.completions] for key, result in results.items()}


def as_text(ids: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in ids)


def test_a_sampled_row_gives_the_same_tokens_whatever_it_is_batched_with(
    family: Callable[[str], Any], make_engine: Make, answer: Answer
) -> None:
    hashes = [None, *(adapter.sha256 for adapter in family("llama").adapters)]
    rows = [
        Request(k, prompt, Sampling(24, temperature=0.9, top_p=0.95, seed=k * 7, n=1 + k % 2), plain(hashes[k % 6]))
        for k, prompt in enumerate(prompts(18))
    ]
    together = tokens(answer(make_engine(max_loras_per_batch=3), rows))
    alone = tokens(answer(make_engine(max_num_seqs=1), rows))
    shuffled = random.Random(1).sample(rows, len(rows))
    chunked = tokens(answer(make_engine(max_loras_per_batch=1, max_num_seqs=5, max_num_batched_tokens=9), shuffled))
    assert together == alone == chunked
    other = [Request(r.key, r.prompt, Sampling(24, temperature=0.9, seed=r.key * 7 + 1), r.mix) for r in rows]
    assert tokens(answer(make_engine(), other)) != together


def test_a_small_cache_changes_no_answer(make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows grow page by page, give way and start over; what they say stays the same."""
    rows = [Request(k, prompt, Sampling(200, temperature=0, ignore_eos=True)) for k, prompt in enumerate(prompts(6))]
    roomy = make_engine()
    expected = tokens(answer(roomy, rows))
    per_token = 3 * 2 * (16 + 16) * 4
    monkeypatch.setattr(room, "GROWTH_TOKENS", 16)
    tight = make_engine(kv_cache_memory=3 * 256 * per_token)
    assert tokens(answer(tight, rows)) == expected
    assert tight.stats.preemptions > 0, "the cache was meant to be too small for all"
    assert roomy.stats.preemptions == 0


def test_a_row_reserves_what_it_needs_and_no_more_than_the_limit(make_engine: Make) -> None:
    with pytest.raises(ModelError, match="--kv-cache-memory"):
        make_engine(kv_cache_memory=1000)


def test_endings(make_engine: Make, answer: Answer) -> None:
    prompt = [5, 9, 11, 40]
    free = answer(make_engine(), [Request(0, prompt, Sampling(12, temperature=0, ignore_eos=True))])[0].completions[0]
    assert (free.finish_reason, len(free.token_ids)) == (FinishReason.LENGTH, 12)
    third = free.token_ids[2]
    first = free.token_ids.index(third)
    by_id = answer(make_engine(), [Request(0, prompt, Sampling(12, temperature=0, stop_token_ids=(third,)))])[0]
    assert by_id.completions[0].token_ids == free.token_ids[: first + 1]
    assert by_id.completions[0].finish_reason is FinishReason.STOP
    text = as_text(free.token_ids)
    stop = text[3:5]
    sampling = Sampling(12, temperature=0, ignore_eos=True, stop=("never", stop))
    by_text = answer(make_engine(), [Request(0, prompt, sampling, decode=as_text)])[0].completions[0]
    assert (by_text.finish_reason, by_text.stop_string) == (FinishReason.STOP, stop)
    assert as_text(by_text.token_ids) == text[: text.index(stop) + 2]


def test_the_end_of_sequence_token_ends_a_row_unless_ignored(make_engine: Make, answer: Answer) -> None:
    bias = {2: 100.0}  # the model's eos
    sampling = Sampling(5, temperature=0, logit_bias=bias)
    ended = answer(make_engine(), [Request(0, [7], sampling)])[0].completions[0]
    assert (ended.token_ids, ended.finish_reason) == ([2], FinishReason.STOP)
    on = answer(make_engine(), [Request(0, [7], Sampling(5, temperature=0, logit_bias=bias, ignore_eos=True))])[0]
    assert on.completions[0].token_ids == [2] * 5


def test_n_answers_come_together_in_order_and_differ(make_engine: Make, answer: Answer) -> None:
    results = answer(make_engine(), [Request(3, [5, 6], Sampling(10, seed=1, n=4, logprobs=2))])
    completions = results[3].completions
    assert [c.index for c in completions] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in completions}) > 1
    for completion in completions:
        assert completion.logprobs is not None
        assert [one.token_id for one in completion.logprobs] == completion.token_ids
        assert all(len(one.top) == 2 and one.logprob <= one.top[0][1] + 1e-6 for one in completion.logprobs)


def test_a_row_that_turns_to_nan_fails_alone(make_engine: Make, answer: Answer) -> None:
    # Pages that came free last are given out first: the later rows get those of the poisoned ones.
    fine = [Request(0, [9] * 35, Sampling(6, temperature=0, ignore_eos=True))]
    fine += [Request(key, [7, 8], Sampling(40, temperature=0, ignore_eos=True)) for key in (1, 2, 3)]
    healthy = tokens(answer(make_engine(), fine))
    said = {token for completions in healthy.values() for one in completions for token in one}
    poison = min(set(range(10, 97)) - said)
    engine = make_engine()
    with torch.no_grad():
        engine._model._model.get_input_embeddings().weight[poison] = float("nan")
    poisoned = [Request(key, [poison] * 30, Sampling(6, temperature=0, n=key)) for key in (1, 3)]
    results = answer(engine, [fine[0], *poisoned])
    assert tokens({0: results[0]}) == {0: healthy[0]}
    for row in poisoned:
        assert results[row.key].completions == []
        assert "not finite" in str(results[row.key].error)
    assert engine.num_running == 0
    # Their NaN lies beyond the end of whoever comes next: masked, but 0 * NaN is NaN.
    assert tokens(answer(engine, fine)) == healthy


def test_cancelling_leaves_what_runs_and_frees_the_keys(make_engine: Make) -> None:
    engine = make_engine(max_num_seqs=2)
    for key in range(5):
        engine.add(Request(key, [5], Sampling(3, temperature=0, ignore_eos=True)))
    engine.step()
    assert engine.cancel_waiting() == [2, 3, 4]
    engine.add(Request(2, [5], Sampling(1, temperature=0)))
    finished = []
    while engine.has_work:
        finished += [result.key for result in engine.step()]
    assert sorted(finished) == [0, 1, 2]
    assert engine.step() == []


def test_rows_are_dropped_amid_their_answers_and_disturb_nobody(
    family: Callable[[str], Any], make_engine: Make, answer: Answer
) -> None:
    adapter = family("llama").adapters[0].sha256
    rows = [Request(k, [5 + k], Sampling(9, temperature=0, ignore_eos=True), plain(adapter)) for k in range(4)]
    expected = tokens(answer(make_engine(), rows))
    engine = make_engine(max_num_seqs=3)
    for row in rows:
        engine.add(row)
    engine.step()
    engine.step()
    engine.cancel([0, 3])  # one runs, one waits
    assert (engine.num_running, engine.num_waiting) == (2, 0)
    engine.add(rows[0])
    assert tokens(answer(engine, [])) == {key: expected[key] for key in (0, 1, 2)}
    engine.forget(adapter)  # nothing holds it


def test_a_pass_says_which_rows_it_begins(make_engine: Make) -> None:
    engine = make_engine(max_num_seqs=2)
    for key in range(3):
        engine.add(Request(key, [5], Sampling(2, temperature=0, ignore_eos=True)))
    begun: list[list[int]] = []
    while engine.has_work:
        engine.step(lambda keys: begun.append(list(keys)))
    assert begun == [[0, 1], [2]]


class Short:
    """A device that holds passes of so many rows, and of rows that say nothing forbidden."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, rows: int, error: BaseException) -> None:
        self.rows, self.error, self.poison = rows, error, -1
        self.tried: list[int] = []
        self._forward = engine._model.forward
        monkeypatch.setattr(engine._model, "forward", self.forward)

    def forward(self, batch: Any) -> torch.Tensor:
        self.tried.append(len(batch.outputs))
        logits = self._forward(batch)  # what it wrote to the cache is there when the memory ends
        if len(batch.outputs) > self.rows or bool((batch.tokens == self.poison).any()):
            raise self.error
        return logits


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_pass_that_runs_out_of_memory_is_made_again_smaller(
    family: Callable[[str], Any], make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    hashes = [None, *(adapter.sha256 for adapter in family("llama").adapters)]
    rows = [Request(k, p, Sampling(8, temperature=0.8, seed=k), plain(hashes[k % 4])) for k, p in enumerate(prompts(9))]
    expected = tokens(answer(make_engine(), rows))
    engine = make_engine(max_num_seqs=8, max_loras_per_batch=3)
    device = Short(engine, monkeypatch, 3, error)
    assert tokens(answer(engine, rows)) == expected
    assert device.tried[:3] == [8, 4, 2]
    assert (engine.max_num_seqs, engine.stats.out_of_memory) == (2, 2)
    device.rows = 99
    assert tokens(answer(engine, rows)) == expected


def test_a_row_that_is_too_much_by_itself_fails_and_the_others_get_their_room_back(
    make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Request(key, [5 + key, 6], Sampling(4, temperature=0, ignore_eos=True)) for key in range(6)]
    expected = tokens(answer(make_engine(), rows))
    rows[2] = Request(2, [96, 96], Sampling(4, temperature=0, logit_bias={96: -100.0}, n=2))
    engine = make_engine(max_num_seqs=4)
    device = Short(engine, monkeypatch, 99, torch.OutOfMemoryError("too much"))
    device.poison = 96
    results = answer(engine, rows)
    assert (results[2].code, results[2].completions) == ("out_of_memory", [])
    assert "3 times: too much" in str(results[2].error)
    assert tokens({key: results[key] for key in expected if key != 2}) == {k: expected[k] for k in expected if k != 2}
    assert engine.max_num_seqs == 4
    assert engine.num_running == 0


def test_memory_that_runs_out_while_adapters_are_loaded(
    family: Callable[[str], Any], make_engine: Make, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = family("llama").adapters[:3]
    rows = [Request(k, [5 + k], Sampling(5, temperature=0), plain(a.sha256)) for k, a in enumerate(adapters)]
    expected = tokens(answer(make_engine(), rows))
    engine = make_engine()
    projection = engine._model.projections[0]
    put, count = projection.put, 0

    def short(*given: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        put(*given)

    monkeypatch.setattr(projection, "put", short)
    assert tokens(answer(engine, rows)) == expected
    assert engine.stats.out_of_memory == 1


def test_another_error_of_the_device_is_not_about_memory(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    Short(engine, monkeypatch, 0, RuntimeError("CUDA error: device-side assert triggered"))
    engine.add(Request(0, [5], Sampling(3)))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.step()


def test_what_cannot_be_queued_is_refused(family: Callable[[str], Any], make_engine: Make) -> None:
    engine = make_engine()
    engine.add(Request(0, [5], Sampling(3)))
    for request, why in [
        (Request(0, [5], Sampling(3)), "row 0"),
        (Request(1, [], Sampling(3)), "at least 1"),
        (Request(1, [5], Sampling(0)), "at least 1"),
        (Request(1, [5] * 200, Sampling(57)), "together at most 256"),
        (Request(1, [5], Sampling(3), plain("feed")), "not registered"),
        (Request(1, [5], Sampling(3, stop=("x",))), "decode"),
    ]:
        with pytest.raises(ValueError, match=why):
            engine.add(request)
    assert engine.num_waiting == 1


def test_the_counters_add_up(family: Callable[[str], Any], make_engine: Make, answer: Answer) -> None:
    one = family("llama")
    engine = make_engine(max_loras_per_batch=2)
    rows = [
        Request(k, prompt, Sampling(5, temperature=0, ignore_eos=True), plain(one.adapters[k % 3].sha256))
        for k, prompt in enumerate(prompts(9))
    ]
    answer(engine, rows)
    stats = engine.stats
    assert stats.prompt_tokens == sum(len(row.prompt) for row in rows)
    assert stats.completion_tokens == 45
    assert (stats.adapter_loads, stats.adapter_evictions, stats.waves) == (3, 1, 2)
    assert (stats.running, stats.resident) == (0, 2)
    assert sum(stats.step_times.counts) == stats.steps
    assert stats.step_times.sum_s > 0
    assert stats.batch_rows >= 45
    assert stats.batch_places == stats.steps * engine.max_num_seqs == stats.steps * stats.places
    assert (stats.kv_used, stats.kv_tokens > 0) == (0, True)
    engine.add(rows[0])
    engine.step()
    assert 0 < engine.stats.kv_used <= engine.stats.kv_tokens


def test_adapters_are_registered_and_forgotten(family: Callable[[str], Any], make_engine: Make, answer: Answer) -> None:
    one = family("llama").adapters[0]
    engine = make_engine()
    row = Request(0, [5, 6, 7], Sampling(6, temperature=0, ignore_eos=True), plain(one.sha256))
    before = tokens(answer(engine, [row]))
    engine.add(row)
    engine.step()
    with pytest.raises(ValueError, match="in use by rows"):
        engine.forget(one.sha256)
    while engine.has_work:
        engine.step()
    engine.forget(one.sha256)
    engine.forget(one.sha256)
    with pytest.raises(ValueError, match="not registered"):
        engine.add(row)
    engine.register(one)
    engine.register(one)
    assert tokens(answer(engine, [row])) == before


def test_next_logits_are_those_of_the_token_that_a_row_gets(
    family: Callable[[str], Any], make_engine: Make, answer: Answer
) -> None:
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=4)
    for adapter in (None, *family("llama").adapters[:2]):
        mix = plain(adapter and adapter.sha256)
        prompt = [5, 9, 11, 40] * 5
        logits = engine.next_logits(prompt, mix)
        assert (logits.shape, logits.dtype) == ((97,), torch.float32)
        (said,) = answer(engine, [Request(0, prompt, Sampling(1, temperature=0, logprobs=1), mix)]).values()
        (token,) = said.completions[0].token_ids
        assert token == int(logits.argmax())
        logprobs = said.completions[0].logprobs
        assert logprobs is not None
        assert logprobs[0].logprob == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-4)
    engine.add(Request(1, [5], Sampling(3)))
    with pytest.raises(ValueError, match="without work"):
        engine.next_logits([5])
