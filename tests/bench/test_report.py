"""Tables: made from results alone, put between the markers of a document and nowhere else."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from bench.point_report import plots, table
from bench.report import DOCUMENTS, load, render

RESULT: dict[str, Any] = {
    "name": "main",
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
    assert lines[0] == "| | output tokens/s, median (range) | of loramill, no LoRA | ours, is |"
    assert lines[2] == "| ours | 400 (300-500) |  |  |"
    assert lines[3] == "| theirs | 100 (90-110) |  | 3.00 (2.00-4.00)x |"
    assert lines[4] == "| other | absent: not installed | | |"
    base = RESULT["runners"]["loramill"] | {"title": "base", "run_s": [0.5, 1.0]}
    lines = table(RESULT | {"runners": {"loramill-base": base, **RESULT["runners"]}}).splitlines()
    assert lines[2] == "| base | 400 (300-500) |  | 0.50 (0.50-0.50)x |"
    assert lines[4] == "| theirs | 100 (90-110) | 19% (12%-25%) | 3.00 (2.00-4.00)x |"


def test_render_replaces_only_marked_sections() -> None:
    summary, results, end = "<!-- bench:summary -->\n", "<!-- bench:points -->\n", "<!-- /bench -->\n"
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


def test_every_point_has_its_table_and_plot_and_growth_has_one() -> None:
    runners = {"loramill": RESULT["runners"]["loramill"] | {"peak_bytes": [2**20, 3 * 2**20]}}
    spec = {"all_output_tokens": 9, "least_prompt_tokens": 0, "shared_tokens": 0}
    others = {"ranks-mixed": {"least_rank": 8}, "outputs-varied": {"least_output_tokens": 4}, "shared-prompt": spec}
    results = [RESULT | {"name": name, "job": {**RESULT["job"], **job}} for name, job in others.items()]
    tiny = RESULT["job"] | {"tiny": True, "rows": 1000}
    grown = RESULT | {"name": "growth-1000", "job": tiny, "runners": runners}
    made = render("<!-- bench:points -->\n<!-- /bench -->\n", [RESULT, grown, *results])
    assert "ranks 8 to 16 on q_proj" in made
    assert "10 prompt + 4 to 5 output tokens" in made
    assert "| 1,000 | 1,500 (1,000-2,000) | 750 (500-1,000) | 2 (1-3) MiB |" in made
    drawn = plots([RESULT, grown, *results])
    assert set(drawn) == {f"bench-{name}.svg" for name in ("main", "growth", *others)}
    for one in drawn.values():
        assert ElementTree.fromstring(one).tag.endswith("svg")


def test_the_engine_says_what_lies_outside_the_forward_pass() -> None:
    values = {"median": 0.02, "low": 0.01, "high": 0.03}
    passes = {"no LoRA": {"title": "no LoRA", "pass_s": values, "outside_s": values, "outside": values}}
    result = {key: RESULT[key] for key in ("date", "hardware", "job")}
    result |= {"part": "engine-time", "passes": passes, "command": "x", "versions": {"torch": "2"}}
    made = render("<!-- bench:engine -->\n<!-- /bench -->\n", [result])
    assert "| no LoRA | 20.00 (10.00-30.00) | 20.00 (10.00-30.00) | 2.0% (1.0%-3.0%) |" in made


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_results_that_are_kept(document: Any) -> None:
    if document.exists():
        shown = render(document.read_text(), load())
        assert shown == document.read_text(), "run `python -m bench.report`"


def test_modes_and_thousand_say_what_was_measured() -> None:
    shape = {
        "job": {"rows": 8, "prompt_tokens": 3, "output_tokens": 2, "rank": 4, "parameters": 12_000_000},
        "run_s": {"dynamic": [2.0, 3.0, 4.0], "static": [1.0, 1.0, 2.0], "auto": [1.0, 1.1, 1.2]},
        "better": "static",
        "auto_over_better": [1.0, 1.1, 0.6],
        "details": {"auto": {"modes": {"static": 8}}},
    }
    about = {key: RESULT[key] for key in ("date", "hardware")} | {"versions": {"torch": "2"}}
    modes = {"part": "modes", "command": "python -m bench.modes", "shapes": {"one": shape}, **about}
    kept = {"adapter_loads": 4, "host_loads": 5, "host_hits": 6, "host_bytes_read": 7e6, "host_most_bytes": 2**20}
    runs = [{"run_s": seconds, "host_waited_s": 0.5, **kept} for seconds in (3.0, 1.0, 2.0)]
    job = {"rows": 20000, "adapters": 1000, "zipf": 1.0, "ranks": [4, 8]}
    thousand = {"part": "thousand", "command": "x", "job": job, "host_bytes": 2**20, "runs": {"plan": runs}, **about}
    document = "<!-- bench:modes -->\n<!-- /bench -->\n<!-- bench:thousand -->\n<!-- /bench -->\n"
    made = render(document, [modes, thousand])
    assert (
        "| one | 3.0 s (2.0 s to 4.0 s) | 1.0 s (1.0 s to 2.0 s) | 1.1 s (1.0 s to 1.2 s) | 1.00 (0.60 to 1.10)" in made
    )
    assert "(static) | 8 rows static |" in made
    assert "| plan | 2.0 (1.0 to 3.0) | 4 | 5 | 6 | 7 | 500 (500 to 500) ms | 1.0 MiB |" in made


def test_the_queue_says_what_a_row_costs() -> None:
    took = {"wall_s": 10.0, "cpu_s": 5.0, "max_rss_bytes": 100 * 2**20}
    answer = {"rows_per_s": 25_000.0, "all_rows": 1_000_000, "worker_cpu_s": 50.0, "redis_cpu_s": 2.0}
    result = {
        "part": "queue", "date": "2026-11-21", "command": "python -m bench.queue", "rows": 1_000_000, "workers": 4,
        "fsync": "everysec", "row_bytes": 100.4, "result_bytes": 550.2,
        "submit": took, "collect": took, "answer": answer,
        "redis_bytes_per_row": {"input": 8.0, "output": 64.0},
        "embedded": {"rows": 1000, "cpu_s": 0.06, "rows_per_s": 16_000.0},
        "hardware": {"cores": 2, "cpu": "a CPU"}, "versions": {"redis-server": "7.0.15"},
    }  # fmt: skip
    made = render("<!-- bench:queue -->\n<!-- /bench -->\n", [result])
    assert "| `submit` | 100,000 | 5 µs | 100 MiB |" in made
    assert "| 4 workers, first commit to last | 25,000 | 52 µs, of which Redis 2 | |" in made
    assert "one process | 16,000 | 60 µs | |" in made
    assert "8 bytes a row of input and 64 of output (8 and 61 MiB a million rows)" in made


def test_the_server_says_what_it_takes_and_who_else_was_there() -> None:
    one = {
        "started_rss_bytes": 80e6, "idle_rss_bytes": 300e6, "peak_rss_bytes": 350e6, "looks": 6000, "median_s": 0.005,
        "p99_s": 0.1, "slowest_s": 0.25, "uploads_s": [4.0, 5.0, 8.0], "downloads_s": [], "others_cores": 0.04,
    }  # fmt: skip
    result = {
        "part": "serve", "date": "2026-11-21", "command": "python -m bench.serve", "clients": 200, "file_bytes": 2e8,
        "stores": {"sqlite": one, "redis": one}, "hardware": {"cores": 2, "cpu": "a CPU"},
    }  # fmt: skip
    made = render("<!-- bench:serve -->\n<!-- /bench -->\n", [result])
    row = "80 MB | 300 MB | 350 MB | 5 ms | 100 ms | 250 ms | 40 MB/s | not done in time | 0.0 |"
    assert f"| SQLite | {row}" in made
    assert f"| Redis | {row}" in made
    assert "6,000 and 6,000 looks" in made
