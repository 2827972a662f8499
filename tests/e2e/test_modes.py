"""Static, dynamic and auto through the command: the same answers, decided once, and said."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from loramill.producer import local
from loramill.producer.costs import Costs

STATIC_PAYS = Costs(1e-5, 1e-3, 1e-4, lora_s_per_token=1.0, lora_s_per_row=1.0)
"""What a machine would have to be like on which LoRA costs dear and a merge nothing."""
DYNAMIC_PAYS = Costs(1e-5, 1e-3, 1e-4, merge_s=1000.0)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch):
    """However little work there is, `auto` measures it, and finds these costs."""

    def find(found: Costs) -> None:
        monkeypatch.setattr(local, "MEASURED_SHARE", 1e9)
        monkeypatch.setattr(local, "fit", lambda timings, **others: found)

    return find


def answers(desk: Any) -> dict[str, str]:
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in desk.results()}


def modes(desk: Any) -> dict[str, str]:
    return {line["custom_id"]: line["response"]["body"]["loramill"]["mode"] for line in desk.results()}


def test_every_mode_order_and_tier_gives_the_same_answers(desk, rows) -> None:
    mixed = [
        {**row, "adapter": None, "adapters": [{"name": "one", "scale": 0.5}, {"name": "two"}]} if n % 5 == 4 else row
        for n, row in enumerate(rows(40))
    ]
    desk.write(mixed)
    assert desk.run("--json", "--lora-mode", "dynamic").code == 0
    expected = answers(desk)
    assert set(modes(desk).values()) == {"base", "dynamic"}
    ways = [
        ("--lora-mode", "static"),
        ("--lora-mode", "auto", "--order", "input"),
        ("--lora-mode", "static", "--order", "input", "--max-num-seqs", "2", "--max-num-batched-tokens", "16"),
        ("--max-loras-per-batch", "2", "--max-loaded-loras", "2", "--lora-eviction-policy", "lru", "--pin", "two"),
        ("--max-loras-per-batch", "2", "--lora-host-bytes", "100kB", "--lora-eviction-policy", "fifo", "--preload"),
    ]
    for way in ways:
        ended = desk.run("--json", "--overwrite", *way)
        assert ended.code == 0, ended.err
        assert answers(desk) == expected, way
        static = "static" in way
        assert set(modes(desk).values()) == {"base", "static" if static else "dynamic"}
        assert (ended.summary["merges"] > 0) == static
        assert (ended.summary["adapter_loads"] > 0) != static
        assert (ended.summary["adapters_static"], ended.summary["adapters_dynamic"]) == ((4, 0) if static else (0, 4))


def test_auto_says_what_it_decided_and_why(desk, rows, costs) -> None:
    desk.write(rows(40))
    ended = desk.run("--json")
    assert "3 adapters and mixes side by side: dynamic: too little work to measure" in ended.err
    costs(STATIC_PAYS)
    ended = desk.run("--json", "--overwrite")
    assert "one: static: " in ended.err
    assert ended.summary["adapters_static"] == 3
    assert ended.summary["prompt_tokens"] == sum(5 + len(str(n)) for n in range(40)), "measuring counts nowhere"
    costs(DYNAMIC_PAYS)
    assert desk.run("--json", "--overwrite").summary["adapters_static"] == 0


def test_it_measures_by_itself_where_the_work_is_worth_it(desk, rows, monkeypatch) -> None:
    desk.write(rows(8))
    monkeypatch.setattr(local, "MEASURED_SHARE", 1e9)
    ended = desk.run("--json", "--max-num-seqs", "4")
    assert ended.code == 0
    assert "too little work" not in ended.err
    assert ended.summary["rows"] == 8


@pytest.mark.parametrize("flags", [("--kv-cache-memory", "40kB"), ("--max-num-batched-tokens", "9")])
def test_it_measures_in_little_room_too(desk, rows, monkeypatch, flags: tuple[str, ...]) -> None:
    desk.write(rows(8))
    monkeypatch.setattr(local, "MEASURED_SHARE", 1e9)
    assert desk.run("--json", "--max-num-seqs", "6", *flags).code == 0
    answered = answers(desk)
    assert desk.run("--json", "--overwrite", "--lora-mode", "dynamic").code == 0
    assert answers(desk) == answered


def test_rows_of_one_token_are_not_worth_measuring(desk, rows, monkeypatch) -> None:
    monkeypatch.setattr(local, "MEASURED_SHARE", 1e9)
    desk.write({"id": row["id"], "adapter": row["adapter"], "prompt": [65], "max_tokens": 1} for row in rows(8))
    assert desk.run("--json").code == 0
    assert desk.run("--json", "--explain").code == 0


def test_a_resumed_job_decides_alike(desk, rows, costs, monkeypatch) -> None:
    costs(STATIC_PAYS)
    desk.write(rows(40))
    real = local.LocalEngine.run

    def interrupted(self: Any, shard: Any, *, stopping: Any, on_step: Any) -> None:
        seen = 0

        def some() -> bool:
            nonlocal seen
            seen += 1
            return seen > 12

        real(self, shard, stopping=some, on_step=on_step)

    with monkeypatch.context() as patched:
        patched.setattr(local.LocalEngine, "run", interrupted)
        assert desk.run("--json", "--max-num-seqs", "4").code == 130
    assert desk.journal.exists()
    costs(DYNAMIC_PAYS)
    refused = desk.run("--json", "--lora-mode", "dynamic")
    assert refused.code == 4
    assert "--lora-mode changed since" in refused.err
    explained = desk.run("--explain", "--json")
    assert explained.code == 0
    assert 0 < sum(wave["rows"] for wave in explained.summary["waves"]) < 40, "what is left"
    ended = desk.run("--json", "--max-num-seqs", "4")
    assert ended.code == 0
    assert ended.summary["resumed"] > 0
    assert "static: decided by an earlier run of this job" in ended.err
    assert {mode for mode in modes(desk).values() if mode != "base"} == {"static"}


def test_explain_prints_the_plan_and_runs_nothing(desk, rows, costs) -> None:
    costs(STATIC_PAYS)
    desk.write(rows(40))
    ended = desk.run("--json", "--explain")
    assert ended.code == 0
    assert desk.files() == set()
    plan = ended.summary
    assert [wave["mode"] for wave in plan["waves"]] == ["dynamic", "static", "static", "static"]
    assert sum(wave["rows"] for wave in plan["waves"]) == 40
    assert {name: one["mode"] for name, one in plan["mixes"].items()} == dict.fromkeys(
        ("one", "two", "three"), "static"
    )
    assert plan["predicted"]["merges"] == 3
    assert plan["predicted"]["seconds"] > 0
    ended = desk.end(desk.start("--explain", "--quiet"))
    assert ended.code == 0, ended.err
    assert "waves" in ended.out
    assert "one: dynamic: too little work to measure" in ended.out
    assert re.search(r"predicted at most: [0-9,]+ passes, [0-9.,]+ s;", ended.out)
    assert desk.files() == set()


def test_adapters_that_can_only_be_merged_run_beside_others(desk, rows, tmp_path, make_adapter) -> None:
    dora = make_adapter(tmp_path / "dora", use_dora=True, seed=5)
    flags = ("--adapter", f"dora={dora}", "--lora-mode", "dynamic", "--preload")
    mine = [{**row, "adapter": "dora" if n % 2 else row["adapter"]} for n, row in enumerate(rows(12))]
    desk.write(mine)
    ended = desk.run("--json", *flags)
    assert ended.code == 0, ended.err
    assert {modes(desk)[row["id"]] for row in mine if row["adapter"] == "dora"} == {"static"}
    assert "dora: static: it can only be served merged" in ended.err
    desk.write(
        [{**mine[1], "scale": 0.5}, {**mine[3], "adapter": None, "adapters": [{"name": "dora"}, {"name": "one"}]}]
    )
    ended = desk.run("--overwrite", *flags)
    assert ended.code == 4
    assert ended.err.count("adapter `dora` can only be used alone and at strength 1: DoRA") == 2
    ended = desk.run("--overwrite", *flags, "--pin", "dora")
    assert ended.code == 4, "the lines come first"
    desk.write(mine)
    ended = desk.run("--overwrite", *flags, "--pin", "dora")
    assert (ended.code, "--pin dora: it can only be served merged" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--pin", "on"), 2, "--pin on: no adapter has that name; did you mean `one`?"),
        (("--pin", "one", "--pin", "two", "--max-loras-per-batch", "2"), 2, "2 adapters leave no slot"),
        (("--lora-host-bytes", "10"), 4, "bytes are more than the 10 of --lora-host-bytes"),
        (("--lora-host-bytes", "0"), 2, "not above 0"),
        (("--max-loaded-loras", "0"), 2, "--max-loaded-loras"),
        (("--lora-mode", "merged"), 2, "--lora-mode"),
        (("--lora-eviction-policy", "belady"), 2, "--lora-eviction-policy"),
        (("--order", "random"), 2, "--order"),
    ],
)
def test_flags_that_cannot_be(desk, rows, flags: tuple[str, ...], code: int, says: str) -> None:
    desk.write(rows(8))
    ended = desk.run(*flags)
    assert (ended.code, says in ended.err) == (code, True), ended.err
    assert not desk.output.exists()


def test_an_adapter_replaced_amid_a_job_never_answers_a_row(desk, rows, make_adapter, tmp_path) -> None:
    own = tmp_path / "adapters"
    shutil.copytree(desk.adapters, own)
    desk.adapters = own
    desk.write(rows(400, max_tokens=30, ignore_eos=True))
    # One slot: `three` is read when `one` and `two` are done, long after it was checked.
    wait = "import loramill.worker.host_tier as tier; tier.HostTier.prefetch = lambda self, adapters: None"
    process = desk.start("--max-loras-per-batch", "1", "--max-num-seqs", "4", "--json", before=wait)
    deadline = time.monotonic() + 60
    while not desk.journal.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    other = make_adapter(tmp_path / "other", seed=77)
    for name in ("one", "two", "three"):
        shutil.copytree(other, own / name, dirs_exist_ok=True)
    process.send_signal(signal.SIGCONT)
    ended = desk.end(process)
    assert ended.code in (0, 3), ended.err
    shown = {
        (line["response"]["body"]["loramill"]["adapter"], line["response"]["body"]["loramill"]["adapter_sha256"])
        for line in desk.results()
    }
    assert len(shown) == len({name for name, _ in shown}), "one content a name"
    failed = desk.results(desk.errors)
    assert {line["response"]["body"]["error"]["code"] for line in failed} == {"adapter_unavailable"}
    assert "changed on disk" in failed[0]["response"]["body"]["error"]["message"]
    assert len(failed) + len(desk.results()) == 400


@pytest.mark.parametrize("compiled", [True, False])
def test_json_has_what_was_moved(desk, rows, compiled: bool) -> None:
    desk.write(rows(40))
    before = "" if compiled else "import os; os.environ['LORAMILL_NATIVE'] = '0'"
    ended = desk.end(desk.start("--json", "--max-loras-per-batch", "1", "--max-loaded-loras", "1", before=before))
    assert ended.code == 0, ended.err
    summary = ended.summary
    assert summary["adapter_loads"] == summary["host_loads"] == 3
    assert summary["adapter_evictions"] == summary["host_evictions"] == 2
    one = sum(path.stat().st_size for path in Path(desk.adapters / "one").glob("*.safetensors"))
    # One at a time; in panels of 16 columns small ranks take more.
    assert 0.8 * one < summary["host_most_bytes"] <= (2 * one if compiled else one)
    assert summary["host_bytes_read"] == 3 * summary["host_most_bytes"]
    # To point at three adapters takes less than the last digit, to copy them does not.
    assert summary["adapter_load_s"] >= 0 if compiled else summary["adapter_load_s"] > 0
