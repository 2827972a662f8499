"""The Python API on a real engine."""

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loramill import AsyncMill, Mill
from loramill.producer import mill as module
from loramill.producer.cli import main

NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def options(tiny_base: Path, tiny_adapters: Path) -> dict[str, Any]:
    adapters = {name: tiny_adapters / name for name in NAMES}
    return {"base_model": tiny_base, "adapters": adapters, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def mill(options: dict[str, Any]) -> Iterator[Mill]:
    with Mill(**options, max_num_seqs=4) as opened:
        yield opened


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_results_come_in_the_order_of_the_prompts(mill: Mill) -> None:
    prompts = [f"{'x' * (number * 7 % 30)} {number}" for number in range(20)]
    results = list(mill.generate(prompts, adapter="one", max_tokens=5, temperature=0))
    assert [result.index for result in results] == list(range(20))
    alone = next(iter(mill.generate(prompts[3], adapter="one", max_tokens=5, temperature=0)))
    assert (alone.text, alone.token_ids) == (results[3].text, results[3].token_ids)
    assert {result.adapter for result in results} == {"one"}
    for result in results:
        assert result.finish_reason in ("stop", "length")
        assert result.completion_tokens == len(result.token_ids) <= 5


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("text", 1),
        (["text", "more"], 2),
        ([1, 2, 3], 1),
        ([[1, 2], [3]], 2),
        (chat("hi"), 1),
        ([chat("hi"), chat("ho")], 2),
        (iter(["a", "b", "c"]), 3),
        ([], 0),
    ],
)
def test_every_form_of_prompts(mill: Mill, prompts: Any, count: int) -> None:
    results = list(mill.generate(prompts, max_tokens=2))
    assert len(results) == count
    assert all(result.adapter is None for result in results)


def test_rows_with_their_own_adapters_and_sampling(mill: Mill) -> None:
    rows = [
        {"adapter": "one", "prompt": "same", "max_tokens": 3, "temperature": 0},
        {"adapter": "two", "prompt": "same", "max_tokens": 4, "temperature": 0, "ignore_eos": True},
        {"id": "mine", "prompt": "same", "n": 2, "logprobs": 1, "max_tokens": 2},
        {
            "custom_id": "openai", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "three", "messages": chat("hi"), "max_tokens": 2},
        },
    ]  # fmt: skip
    first, second, third, fourth = mill.run(rows)
    assert (first.adapter, second.adapter, third.adapter, fourth.adapter) == ("one", "two", None, "three")
    assert len(second.token_ids) == 4
    assert [sample.index for sample in third.samples] == [0, 1]
    assert third.samples[0].logprobs is not None
    assert (third.id, fourth.id) == ("mine", "openai")
    assert "return_token_ids" not in rows[0], "the caller's rows are left as they are"


def test_the_command_gives_the_same_tokens(mill: Mill, options: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"id": f"r{n}", "adapter": NAMES[n % 3], "prompt": f"p {n}", "max_tokens": 6, "return_token_ids": True}
        for n in range(9)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main(
            ["run", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--dtype", "float32",
             "--device", "cpu", "--base-model", str(options["base_model"]), "--quiet",
             *(part for name, path in options["adapters"].items() for part in ("--adapter", f"{name}={path}"))]
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by_command = [line["response"]["body"]["choices"][0]["token_ids"] for line in lines]
    assert [result.token_ids for result in mill.run(rows)] == by_command


@pytest.mark.parametrize(
    ("prompts", "sampling", "says"),
    [
        ("x", {"max_tokenz": 3}, "row 0: max_tokenz: unknown field `max_tokenz`; did you mean `max_tokens`?"),
        (["x", "y"], {"temperature": -1}, "row 1: temperature: "),
        (["x", ""], {}, "row 1: prompt: "),
        ("x", {"top_p": math.nan}, "NaN"),
        ("\ud800", {}, "surrogate"),
        ("x", {"adapter": "onee"}, "did you mean `one`?"),
        ("x", {"max_tokens": 10**6}, "row 0: max_tokens: "),
    ],
)
def test_what_is_wrong_is_a_value_error_before_anything_runs(
    mill: Mill, prompts: Any, sampling: Any, says: str
) -> None:
    with pytest.raises(ValueError, match="rows are invalid") as refused:
        mill.generate(prompts, **sampling)
    assert says in str(refused.value)


def test_a_row_that_the_engine_fails_is_a_result_with_an_error(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramill.worker.engine import Engine
    from loramill.worker.request import Result

    step = Engine.step

    def poisoned(self: Any, on_start: Any) -> list[Result]:
        return [Result(result.key, 1, [], error="not finite") for result in step(self, on_start)]

    monkeypatch.setattr(Engine, "step", poisoned)
    (result,) = mill.generate("x", max_tokens=1)
    assert (result.error, result.samples) == ("not finite", [])
    with pytest.raises(RuntimeError, match="row 0 failed: not finite"):
        _ = result.text


def test_leaving_early_leaves_the_mill_usable(mill: Mill) -> None:
    for result in mill.generate([f"p {n}" for n in range(100)], max_tokens=20):
        assert result.index == 0
        break
    assert len(list(mill.generate(["a", "b"], max_tokens=2))) == 2


def test_two_calls_taken_in_turns(mill: Mill) -> None:
    first = mill.generate([f"a {n}" for n in range(30)], adapter="one", max_tokens=3)
    second = mill.generate([f"b {n}" for n in range(30)], adapter="two", max_tokens=3)
    pairs = list(zip(first, second, strict=True))
    assert len(pairs) == 30
    assert all((a.adapter, b.adapter) == ("one", "two") for a, b in pairs)


def test_bad_models_are_a_value_error_with_every_reason(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        Mill(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"adapter `a`: .*\nadapter `b`: "):
        Mill(options["base_model"], {"a": tmp_path / "no", "b": tmp_path})
    with pytest.raises(TypeError, match="max_lora"):
        Mill(options["base_model"], max_lora=3)


def test_every_way_to_give_an_adapter(options: dict[str, Any], tiny_adapters: Path, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f"""
[adapters]
three = "{tiny_adapters / "three"}"
[aliases]
best = {{ one = 1, two = 0 }}
[routes.task]
sum = "three"
""")
    adapters = {"one": str(tiny_adapters / "one"), "two": (tiny_adapters / "two", 1.0), "4th": f"{tiny_adapters}/one*1"}
    with Mill(options["base_model"], adapters, adapters_file=tmp_path / "a.toml", dtype="float32") as mill:
        assert sorted(mill.adapters) == ["4th", "one", "three", "two"]
        assert mill.adapters["4th"] == mill.adapters["one"]
        halves = [{"name": "one", "scale": 0.5}, {"name": "4th", "scale": 0.5}]
        asked: list[dict[str, Any]] = [{"adapter": "best"}, {"task": "sum"}, {"adapters": halves}]
        results = list(mill.run({"prompt": "same", "max_tokens": 6, "temperature": 0, **each} for each in asked))
        assert [result.adapter for result in results] == ["one", "three", None]
        assert results[2].adapters == {"one": 0.5, "4th": 0.5}
        assert results[0].token_ids == results[2].token_ids, "halves of one content are the whole"
        assert [result.mode for result in results] == ["dynamic"] * 3
        for adapters in ({"../x": tiny_adapters / "one"}, {"x": (tiny_adapters / "one", 0)}):
            with pytest.raises(ValueError, match="is not a"):
                Mill(options["base_model"], adapters)


def say(mill: Mill, adapter: str | None, count: int = 1) -> list[list[int]]:
    results = mill.generate(["same"] * count, adapter=adapter, max_tokens=6, temperature=0)
    return [result.token_ids for result in results]


def test_a_replacement_that_host_memory_cannot_hold_leaves_the_old_one(
    options: dict[str, Any], tiny_adapters: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    big = make_adapter(tmp_path / "big", rank=16)
    first = {"one": tiny_adapters / "one"}
    with Mill(options["base_model"], first, dtype="float32", device="cpu", lora_host_bytes=20_000) as mill:
        before, said = mill.adapters, say(mill, "one")
        with pytest.raises(ValueError, match="bytes are more than the 20,000 of --lora-host-bytes"):
            mill.replace_adapter("one", big)
        assert mill.adapters == before
        assert say(mill, "one") == said


def test_adapters_come_and_go(options: dict[str, Any], tiny_adapters: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"aliases": {"best": "one"}}')
    first = {"one": tiny_adapters / "one"}
    with Mill(options["base_model"], first, adapters_file=tmp_path / "a.json", dtype="float32", device="cpu") as mill:
        with pytest.raises(ValueError, match="did you mean `one`"):
            mill.generate("x", adapter="on")
        mill.add_adapter("new", tiny_adapters / "two")
        two = say(mill, "new")
        assert two != say(mill, "one")
        with pytest.raises(ValueError, match="already: replace_adapter"):
            mill.add_adapter("new", tiny_adapters / "three")
        for name, says in (("best", "an adapter has that name"), ("a b", "is not an adapter name")):
            with pytest.raises(ValueError, match=says):
                mill.add_adapter(name, tiny_adapters / "three")
        with pytest.raises(ValueError, match=r"adapter `worse`: .*no such folder"):
            mill.add_adapter("worse", tmp_path / "nowhere")
        with pytest.raises(ValueError, match="alias `best`: no adapter or alias is named `one`"):
            mill.remove_adapter("one")
        with pytest.raises(ValueError, match="there is no adapter 'neww'; did you mean `new`"):
            mill.remove_adapter("neww")
        assert sorted(mill.adapters) == ["new", "one"], "what was refused changed nothing"
        gone = mill.adapters["new"]
        mill.remove_adapter("new")
        assert list(mill.adapters) == ["one"]
        assert gone not in mill._engine._engine._residency._adapters
        with pytest.raises(ValueError, match="no adapter or model is named `new`"):
            say(mill, "new")
        mill.add_adapter("new", tiny_adapters / "two")
        assert say(mill, "new") == two


def test_rows_keep_the_adapter_that_they_were_checked_with(options: dict[str, Any], tiny_adapters: Path) -> None:
    with Mill(**{**options, "max_num_seqs": 2}) as mill:
        wanted, others = say(mill, "one"), say(mill, "two")
        old = mill.adapters["one"]
        begun = mill.generate(["same"] * 40, adapter="one", max_tokens=6, temperature=0)
        results = [next(begun)]
        late = mill.generate(["same"] * 3, adapter="one", max_tokens=6, temperature=0)
        mill.replace_adapter("one", tiny_adapters / "two")
        assert mill.adapters["one"] == mill.adapters["two"] != old
        assert say(mill, "one") == others
        results += [*begun, *late]
        assert [result.token_ids for result in results] == wanted * 43
        assert {result.adapter_sha256 for result in results} == {old}
        assert say(mill, "one", 2) == others * 2
        assert old not in mill._engine._engine._residency._adapters, "forgotten once its last row was done"


def test_an_adapter_in_use_is_removed_only_after_its_rows(options: dict[str, Any]) -> None:
    with Mill(**{**options, "max_num_seqs": 2}) as mill:
        wanted = say(mill, "one")
        begun = mill.generate(["same"] * 20, adapter="one", max_tokens=6, temperature=0)
        started = [next(begun)]
        unbegun = mill.generate(["same"] * 2, adapter="one", max_tokens=6, temperature=0)
        with pytest.raises(ValueError, match="in use by rows that are not finished; wait=True"):
            mill.remove_adapter("one")
        mill.remove_adapter("one", wait=True)
        assert "one" not in mill.adapters
        assert [result.token_ids for result in [*started, *begun, *unbegun]] == wanted * 22
        never_begun = mill.generate("same", adapter="two")
        del never_begun
        mill.remove_adapter("two")
        left = mill.generate(["same"] * 20, adapter="three", max_tokens=6)
        next(left)
        left.close()
        mill.remove_adapter("three")
        assert mill.adapters == {}


def test_adapters_come_and_go_in_the_async_form(options: dict[str, Any], tiny_adapters: Path) -> None:
    async def job() -> None:
        async with AsyncMill(**options) as mill:

            async def say(adapter: str, count: int = 1) -> list[list[int]]:
                rows = mill.generate(["same"] * count, adapter=adapter, max_tokens=6, temperature=0)
                return [result.token_ids async for result in rows]

            one, two = await say("one"), await say("two")
            await mill.add_adapter("new", tiny_adapters / "one")
            assert await say("new") == one
            rows = asyncio.create_task(say("new", 30))
            await asyncio.sleep(0)
            await mill.replace_adapter("new", tiny_adapters / "two")
            assert await rows in (one * 30, two * 30), "never two versions in one call"
            assert await say("new") == two
            with pytest.raises(ValueError, match="there is no adapter 'nope'"):
                await mill.remove_adapter("nope")
            rows = asyncio.create_task(say("one", 30))
            await asyncio.sleep(0.05)
            await mill.remove_adapter("one", wait=True)
            assert await rows == one * 30
            assert sorted(mill.adapters) == ["new", "three", "two"]

    asyncio.run(job())


def test_the_async_form(options: dict[str, Any]) -> None:
    async def texts(mill: AsyncMill, prompt: str, adapter: str | None) -> list[str]:
        return [r.text async for r in mill.generate([prompt] * 3, adapter=adapter, max_tokens=4, temperature=0)]

    async def job() -> None:
        async with AsyncMill(**options) as mill:
            asked = [(f"p {n}", name) for n in range(4) for name in (None, *NAMES)]
            answers = await asyncio.gather(*(texts(mill, *one) for one in asked))
            with Mill(**options) as plain:
                for (prompt, name), answer in zip(asked, answers, strict=True):
                    (alone,) = plain.generate(prompt, adapter=name, max_tokens=4, temperature=0)
                    assert answer == [alone.text] * 3
            with pytest.raises(ValueError, match="max_tokens"):
                await anext(mill.generate("x", max_tokens=-1))
            async for _ in mill.generate(["left", "early"], max_tokens=3):
                break
            assert [r.index async for r in mill.generate(["a", "b"], max_tokens=1)] == [0, 1]
            assert not [r async for r in mill.generate([])]

    asyncio.run(job())


def test_an_engine_that_dies_is_an_error_for_whoever_waits(options: dict[str, Any], monkeypatch) -> None:
    from loramill.worker.engine import Engine

    def dead(self: Any, on_start: Any) -> None:
        raise RuntimeError("device lost")

    async def job() -> None:
        async with AsyncMill(**options) as mill:
            monkeypatch.setattr(Engine, "step", dead)
            waiting = [anext(mill.generate("x", max_tokens=3)) for _ in range(2)]
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert str(outcome) == "device lost"
            with pytest.raises(RuntimeError, match="device lost"):
                await anext(mill.generate("x"))

    asyncio.run(job())


def test_a_model_that_does_not_load_is_an_error_of_the_async_form_too(tmp_path: Path) -> None:
    async def job() -> None:
        with pytest.raises(ValueError, match="no such folder"):
            async with AsyncMill(tmp_path / "nowhere"):
                pass

    asyncio.run(job())


def test_importing_the_api_does_not_import_torch() -> None:
    code = "import sys; from loramill import AsyncMill, Mill; print('torch' in sys.modules, Mill.__name__)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "False Mill\n"
    assert module.Mill is Mill
