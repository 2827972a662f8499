"""Tables: made from results alone, put between the markers of a document and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from bench.report import DOCUMENTS, load, load_gpu, load_simulations, render, table

RESULT: dict[str, Any] = {
    "name": "small",
    "date": "2026-01-02",
    "command": "python -m bench",
    "hardware": {"cpu": "A CPU", "cores": 2, "threads": 2, "bf16": [], "memory_gib": 8.0},
    "versions": {"python": "3.11.7", "peft": None},
    "job": {
        **{"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "vocab": 512},
        **{"rows": 8, "adapters": 4, "rank": 16, "zipf": 1.0, "prompt_tokens": 10, "output_tokens": 5},
        **{"parameters": 12_000_000, "dtype": "bfloat16", "targets": "q_proj"},
    },
    "runners": {
        "loramill": {
            "title": "ours",
            "run_s": [1.0, 2.0],
            "load_s": [0.5, 0.5],
            "others_cores": [0.04, 0.02],
            "agreement": {"rows": 0.5, "tokens": 0.75, "first": 1.0},
            "details": {"command": "loramill run"},
            "output_tokens_per_s": {"median": 400.0, "low": 300.0, "high": 500.0},
        },
        "peft-mixed": {
            "title": "theirs",
            "run_s": [4.0, 4.0],
            "load_s": [0.5, 0.5],
            "others_cores": [],
            "agreement": {},
            "details": {},
            "output_tokens_per_s": {"median": 100.0, "low": 90.0, "high": 110.0},
        },
    },
    "ratios": {"loramill / peft-mixed": {"median": 4.0, "low": 3.5, "high": 4.5}},
    "absent": {"other": "not installed"},
}


def test_table_has_medians_ranges_ratios_and_absent_peers() -> None:
    lines = table(RESULT).splitlines()
    assert lines[2] == "| ours | 400 (300-500) |  |  |  |"
    assert lines[3] == "| theirs | 100 (90-110) | 4.00 (3.50-4.50)x |  |  |"
    assert lines[4] == "| other | absent: not installed | | | |"


def test_render_replaces_only_marked_sections() -> None:
    summary, results, end = "<!-- bench:summary -->\n", "<!-- bench:results -->\n", "<!-- /bench -->\n"
    document = f"# Title\n{summary}stale\n{end}middle\n{results}{end}end\n"
    made = render(document, [RESULT])
    assert "stale" not in made
    assert made.startswith("# Title\n<!-- bench:summary -->\n| |")
    assert made.endswith("<!-- /bench -->\nend\n")
    assert made.count("400 (300-500)") == 2
    assert "| ours | 1.00, 2.00 | 0.5, 0.5 | 100.0% | 75.0% | 50.0% |" in made
    assert "peft absent" in made
    assert "at most 0.04 cores busy" in made
    assert render(made, [RESULT]) == made
    assert render("no markers", [RESULT]) == "no markers"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_results_that_are_kept(document: Any) -> None:
    if document.exists():
        shown = render(document.read_text(), load(), load_gpu(), load_simulations())
        assert shown == document.read_text(), "run `python -m bench.report`"
