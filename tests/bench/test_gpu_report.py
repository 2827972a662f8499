"""The GPU's section: nothing is said that was not measured, and everything that was."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

from bench.gpu_report import NOT_MEASURED, section, targets
from bench.plot import plot
from bench.report import render


def form(seconds: float, copy: float, gemm: float) -> dict[str, Any]:
    spread = {"median": seconds, "low": seconds, "high": seconds}
    bound = "copy" if copy > gemm else "gemm"
    return {
        "error": 1e-3,
        "seconds": spread,
        "bound": bound,
        "of_bound": max(copy, gemm),
        "of_copy": copy,
        "of_gemm": gemm,
    }


KERNELS: dict[str, Any] = {
    "part": "kernels",
    "device": "NVIDIA H200",
    "date": "2026-01-02",
    "command": "python -m bench.kernels",
    "versions": {"torch": "2.11.0", "loramill": None},
    "method": "By a clock.",
    "ceilings": {"copy": 4e12, "gemm": 8e14},
    "titles": {"loramill": "loramill", "loop": "loop", "vllm": "vLLM", "sglang-16": "S16", "sglang-128": "S<128"},
    "absent": {"other": "no checkout"},
    "layers": [
        {"rank": 16, "rows": 256, "adapters": 32, "alone_percent": 5.5, "added_percent": 7.25,
         "seconds": {"base": {"median": 1e-4}, "lora_alone": {"median": 5.5e-6}}},
        {"rank": 64, "rows": 256, "adapters": 32, "alone_percent": 19.0, "added_percent": 20.0,
         "seconds": {"base": {"median": 1e-4}}},
    ],
    "points": [
        {"name": "decode", "decode": True, "rank": 16, "bytes": 2_000_000, "forms": {
            "loramill": form(1e-5, 80, 5), "loop": {"wrong": 0.5}, "vllm": form(2e-5, 40, 2),
            "sglang-16": form(1.2e-5, 70, 4), "sglang-128": form(1.05e-5, 75, 4)}},
        {"name": "prefill", "decode": False, "rank": 64, "bytes": 9_000_000, "forms": {
            "loramill": form(1e-4, 30, 55), "loop": form(2e-4, 15, 30), "vllm": {"absent": "why"},
            "sglang-16": {"failed": "RuntimeError"}}},
    ],
    "skipped": ["later"],
}  # fmt: skip


def test_without_a_file_it_says_that_nothing_was_measured() -> None:
    document = "<!-- bench:gpu -->\nold\n<!-- /bench -->\n"
    assert render(document, []) == f"<!-- bench:gpu -->\n{NOT_MEASURED}<!-- /bench -->\n"
    assert "Not yet measured" in NOT_MEASURED


def test_targets_are_judged_by_every_point() -> None:
    rows = [target.row().split(" | ", 1)[1] for target in targets(KERNELS)]
    assert rows == ["80% | 1 of 1 |", "55% | 0 of 1 |", "5.5% | 1 of 1 |", "2.00x | 1 of 1 |", "1.05x | 0 of 1 |"]


def test_a_target_without_values_is_not_measured() -> None:
    assert all("not measured" in target.row() for target in targets(KERNELS | {"points": [], "layers": []}))


def test_the_table_has_times_and_what_had_none() -> None:
    text = section([KERNELS])
    assert "| decode | copy | 2.0 | 10.0 (80%) | wrong by 5.0e-01 | 20.0 (40%) | 12.0 (70%) | 10.5 (75%) |" in text
    assert "| prefill | gemm | 9.0 | 100.0 (55%) | 200.0 (30%) | absent | failed |  |" in text
    assert "other is absent: no checkout." in text
    assert "4.00 TB/s and a bf16 GEMM does 800 TFLOP/s" in text
    assert "LoRA alone is 5.5% of the base, and adds 7.2%" in text
    assert "Time ran out before 1 points: later." in text
    assert "torch 2.11.0; `python -m bench.kernels`, 2026-01-02." in text
    assert "](nvidia-h200-kernels.svg)" in text


def test_the_plot_is_svg_with_a_bar_for_each_time() -> None:
    root = ElementTree.fromstring(plot(KERNELS["points"], KERNELS["titles"]))
    boxes = [one for one in root if one.tag.endswith("rect")]
    assert len(boxes) == 1 + len(KERNELS["titles"]) + 6
    assert "S<128" in [one.text for one in root if one.tag.endswith("text")]


def test_the_engine_its_peers_and_the_tests_have_their_lines() -> None:
    base = {"title": "no LoRA", "run_s": [10.0, 12.0, 11.0]}
    dynamic = {"title": "16 slots", "run_s": [10.0, 12.5, 12.0]}
    step = {"title": "no LoRA", "rows": 256, "step_s": 6e-3, "one_at_a_time_s": 7e-3, "floor_s": 5e-3}
    step |= {"of_floor": 1.2, "outside": 0.04}
    engine = {
        **KERNELS, "part": "engine", "setting": "A job.", "job": {"rows": 100, "output_tokens": 22},
        "runners": {"loramill-base": base, "loramill-16": dynamic}, "decode": [{"name": "loramill-base"} | step],
    }  # fmt: skip
    runners = {
        "loramill-base": {"title": "no LoRA", "rows": 512, "output_tokens_per_s": 20000.0},
        "loramill-16": {"title": "16 slots", "rows": 512, "output_tokens_per_s": 18000.0},
        "peft-mixed": {"title": "PEFT", "rows": 64, "output_tokens_per_s": 1500.0},
    }
    peers = {**KERNELS, "part": "peers", "runners": runners, "absent": {"continuous": "late"}, "setting": "A job."}
    tests = {**KERNELS, "part": "tests", "passed": 300, "failed": 0, "skipped": 2}
    text = section([engine, peers, tests])
    assert "| own dynamic, of own no-LoRA: at least 95% | 96.0% (91.7% to 100.0%) | 2 of 3 |" in text
    assert "| own no-LoRA decode step, times its floor: at most 1.35 | 1.20x | 1 of 1 |" in text
    assert "| a pass outside the forward, at 256 rows: at most 5% | 4.0% | 1 of 1 |" in text
    assert "| no LoRA | 11.00 (10.00 to 12.00) | 200 |" in text
    assert "| no LoRA | 256 | 6.00 | 7.00 | 5.00 | 1.20 | 4.0% |" in text
    assert "| loramill-base / transformers-continuous: at least 1.5 | not measured | |" in text
    assert "| loramill-16 / peft-mixed: at least 10 | 12.00x | 1 of 1 |" in text
    assert "| 16 slots | 512 | 18000 | 90% |" in text
    assert "| continuous | | absent: late | |" in text
    assert "300 passed, 0 failed, 2 skipped." in text
