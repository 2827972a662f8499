"""Questions answered by the tiny model: what is streamed is what comes at once, token by token, through a kill too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loramill.store.sqlite_store import SqliteStore
from loramill.worker import engine_process
from loramill.worker.devices import Device
from loramill.worker.engine_process import EngineProcess
from loramill.worker.housekeeping import Housekeeping
from loramill.worker.node import Node
from loramill.worker.worker_settings import WorkerOptions
from tests.producer.api.asked import asked
from tests.worker.queueing import until

TINY = Path(__file__).parents[3] / "examples" / "tiny"
CHAT: Any = [{"role": "user", "content": "reverse: abcdef"}]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Path]]:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv(engine_process.CHILD, raising=False)
        patch.setattr(engine_process, "FIRST_BACKOFF_S", 0.05)
        options = WorkerOptions(
            base_model=str(TINY / "base"), adapters_dir=TINY / "adapters", store="sqlite:///unused", device="cpu",
            dtype="float32", max_num_seqs=8, kv_cache_memory=2**24, worker_id="tiny",
        )  # fmt: skip
        node = Node(options, SqliteStore(folder / "jobs.db"), [EngineProcess(options, Device("cpu", "cpu"), 60)])
        housekeeping = Housekeeping(node)
        node.start()
        housekeeping.start()
        until(lambda: node.ready, 120)
        yield node, folder / "jobs.db"
        housekeeping.stop()
        node.close()


@pytest.fixture(scope="module")
def client(worker: tuple[Node, Path]) -> Iterator[openai.OpenAI]:
    with (
        SqliteStore(worker[1]) as store,
        asked(store) as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as client,
    ):
        yield client


def parts(stream: Any, index: int = 0) -> tuple[str, list[Any], list[str]]:
    """Text, log probabilities and reasons of one answer of a stream."""
    text, tokens, reasons = "", list[Any](), list[str]()
    for chunk in stream:
        for choice in (choice for choice in chunk.choices if choice.index == index):
            text += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
            said = choice.logprobs
            if said is not None:
                listed = getattr(said, "content", None)
                tokens += listed if listed is not None else zip(said.tokens, said.text_offset, strict=True)
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return text, tokens, reasons


@pytest.mark.parametrize("model", ["", *sorted(path.name for path in (TINY / "adapters").iterdir())])
def test_a_streamed_chat_is_the_one_that_comes_at_once(client: openai.OpenAI, model: str) -> None:
    how: Any = {"model": model, "messages": CHAT, "temperature": 0, "max_tokens": 24, "logprobs": True,
                "top_logprobs": 2}  # fmt: skip
    whole = client.chat.completions.create(**how).choices[0]
    text, tokens, reasons = parts(client.chat.completions.create(**how, stream=True))
    assert whole.logprobs is not None
    assert (text, reasons) == (whole.message.content, [whole.finish_reason])
    # The second time the prompt's first pages are there already: its numbers come out of products of other sizes.
    for found, right in zip(tokens, whole.logprobs.content or (), strict=True):
        assert (found.token, found.bytes) == (right.token, right.bytes)
        assert found.logprob == pytest.approx(right.logprob, abs=1e-4)
        for top, right_top in zip(found.top_logprobs, right.top_logprobs, strict=True):
            assert (top.token, top.bytes) == (right_top.token, right_top.bytes)
            assert top.logprob == pytest.approx(right_top.logprob, abs=1e-4)


@pytest.mark.parametrize("stop", [None, "e", ["zz", "b"]])
def test_prompts_seeds_and_stop_strings(client: openai.OpenAI, stop: Any) -> None:
    how: Any = {"model": "", "prompt": "abc", "temperature": 1.5, "seed": 7, "n": 2, "max_tokens": 40, "logprobs": 1,
                "stop": stop, "extra_body": {"ignore_eos": True}}  # fmt: skip
    whole = client.completions.create(**how)
    for index in (0, 1):
        text, tokens, reasons = parts(client.completions.create(**how, stream=True), index)
        mine = whole.choices[index]
        assert mine.logprobs is not None
        pairs = list(zip(mine.logprobs.tokens or (), mine.logprobs.text_offset or (), strict=True))
        assert (text, tokens, reasons) == (mine.text, pairs, [mine.finish_reason])


def test_the_engine_is_killed_amid_an_answer(client: openai.OpenAI, worker: tuple[Node, Path]) -> None:
    node, _ = worker
    how: Any = {"model": "", "prompt": "abc", "temperature": 0, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**how).choices[0].text
    [engine] = node.engines
    restarts, text = engine.restarts, ""
    for chunk in client.completions.create(**how, stream=True):
        if not text:
            engine.kill()
        text += "".join(choice.text for choice in chunk.choices)
    assert text == whole
    assert engine.restarts == restarts + 1
