"""`loramill run` on real files: what comes out, and where."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
import zstandard


def answer(result: dict) -> str:
    return result["response"]["body"]["choices"][0]["text"]


def test_every_row_is_answered_in_input_order_by_the_adapter_that_it_names(desk, rows) -> None:
    job = rows(30)
    desk.write(job)
    ended = desk.run("--json")
    assert ended.code == 0
    results = desk.results()
    assert [result["custom_id"] for result in results] == [row["id"] for row in job]
    assert [result["response"]["body"]["loramill"]["adapter"] for result in results] == [r["adapter"] for r in job]
    assert desk.files() == {"out.jsonl"}, "no error file without errors, and no journal once it is done"
    summary = ended.summary
    assert (summary["rows"], summary["failed"], summary["resumed"], summary["invalid"]) == (30, 0, 0, 0)
    usages = [result["response"]["body"]["usage"] for result in results]
    assert summary["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    assert summary["completion_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    assert summary["adapter_loads"] == 3
    assert summary["adapter_evictions"] == 0
    assert summary["waves"] >= 1
    assert 0 < summary["run_s"] <= summary["total_s"]
    assert 0 < summary["load_s"] <= summary["total_s"]


def test_adapters_change_the_answers_and_slots_do_not(desk, rows) -> None:
    job = [{**row, "prompt": "same"} for row in rows(8)]
    desk.write(job)
    desk.run()
    wide = [answer(result) for result in desk.results()]
    assert wide[:4] == wide[4:]
    assert len(set(wide[:4])) == 4, "the base and three adapters answer the same prompt differently"
    narrow = desk.run("--overwrite", "--json", max_loras_per_batch=1, max_num_seqs=2)
    assert [answer(result) for result in desk.results()] == wide
    assert narrow.summary["adapter_evictions"] >= 2


def test_identical_rows_are_computed_once_unless_that_is_switched_off(desk, rows) -> None:
    desk.write([{**row, "prompt": "same", "adapter": ("one", "two")[n % 2]} for n, row in enumerate(rows(12))])
    once = desk.run("--json", "--quiet")
    shared = [(result["custom_id"], answer(result)) for result in desk.results()]
    each = desk.run("--json", "--quiet", "--overwrite", "--no-dedupe")
    assert [(result["custom_id"], answer(result)) for result in desk.results()] == shared
    assert len({text for _, text in shared}) == 2
    for ended in (once, each):
        assert ended.summary["completion_tokens"] == sum(
            result["response"]["body"]["usage"]["completion_tokens"] for result in desk.results()
        )


def test_openai_lines_chats_and_all_ways_to_name_a_model(desk) -> None:
    def line(name: str, model: str | None) -> dict:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 4, "temperature": 0}
        body |= {"model": model} if model is not None else {}
        return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}

    models = {"a": "one", "b": None, "c": "", "d": "base", "e": "tiny-base", "f": "tiny-base:two", "g": "base:two"}
    desk.write(line(name, model) for name, model in models.items())
    assert desk.run().code == 0
    bodies = {result["custom_id"]: result["response"]["body"] for result in desk.results()}
    served = {name: body["loramill"]["adapter"] for name, body in bodies.items()}
    assert served == {"a": "one", "b": None, "c": None, "d": None, "e": None, "f": "two", "g": "two"}
    assert bodies["a"]["object"] == "chat.completion"
    assert bodies["a"]["choices"][0]["message"]["role"] == "assistant"
    assert bodies["b"]["model"] == "tiny-base"


def test_the_base_can_be_given_another_name(desk, rows) -> None:
    desk.write([{**row, "adapter": "mine"} for row in rows(1)])
    assert desk.run(base_name="mine").code == 0
    assert desk.results()[0]["response"]["body"]["loramill"]["adapter"] is None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_in_and_out(desk, rows, suffix: str, tmp_path: Path) -> None:
    desk.write(rows(3))
    pack, unpack = {
        ".gz": (gzip.compress, gzip.decompress),
        ".zst": (zstandard.compress, lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data)),
    }[suffix]
    packed = tmp_path / ("in.jsonl" + suffix)
    packed.write_bytes(pack(desk.input.read_bytes()))
    output = tmp_path / ("out.jsonl" + suffix)
    assert desk.run(input=packed, output=output).code == 0
    assert [json.loads(line)["custom_id"] for line in unpack(output.read_bytes()).splitlines()] == ["r0", "r1", "r2"]
    assert desk.files() == {packed.name, output.name}


def test_stdin_and_stdout_that_holds_only_the_summary(desk, rows) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows(2))
    process = desk.start("--input", "-", "--json", stdin=subprocess.PIPE)
    out, err = process.communicate(text, timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["rows"] == 2
    assert out.count("\n") == 1
    assert "Traceback" not in err
    assert "Warning" not in err
    assert len(desk.results()) == 2


def test_quiet_says_nothing_at_all(desk, rows) -> None:
    desk.write(rows(2))
    ended = desk.end(desk.start("--quiet"))  # a process of its own: the libraries' bars and warnings would show
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_limit_takes_the_first_rows(desk, rows) -> None:
    desk.write([*rows(3), "not json"])
    assert desk.run(limit=2).code == 0
    assert [result["custom_id"] for result in desk.results()] == ["r0", "r1"]


def test_the_chat_template_flag_and_an_adapters_own_template(desk, make_adapter, tmp_path) -> None:
    own = make_adapter(tmp_path / "own", seed=0)
    (own / "chat_template.jinja").write_text("{{ messages[0].content * 2 }}")
    (tmp_path / "flag.jinja").write_text("{{ messages[0].content }}")
    chat = {"messages": [{"role": "user", "content": "1234567"}], "max_tokens": 1}
    desk.write([{"id": "a", **chat}, {"id": "b", "adapter": "own", **chat}])
    assert desk.run("--adapter", f"own={own}", adapters_dir=None, chat_template=tmp_path / "flag.jinja").code == 0
    tokens = [result["response"]["body"]["usage"]["prompt_tokens"] for result in desk.results()]
    assert tokens == [7, 14]


def test_the_same_job_gives_the_same_bytes_but_for_the_time(desk, rows) -> None:
    desk.write(rows(8, temperature=1.0))

    def lines() -> list[dict]:
        results = desk.results()
        for result in results:
            del result["response"]["body"]["created"]
        return results

    desk.run()
    first = lines()
    desk.run("--overwrite", max_num_seqs=3)
    assert lines() == first
    desk.run("--overwrite", seed=1)
    assert [answer(result) for result in lines()] != [answer(result) for result in first]


def test_logprobs_token_ids_stops_and_several_answers_come_through(desk) -> None:
    desk.write([{"id": "a", "prompt": [1, 2, 3], "max_tokens": 5, "n": 2, "logprobs": 2, "return_token_ids": True}])
    assert desk.run().code == 0
    choices = desk.results()[0]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice in choices:
        assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"]) == 5
        assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])


def test_the_shipped_example(desk) -> None:
    tiny = Path(__file__).parents[2] / "examples" / "tiny"
    ended = desk.run("--json", input=tiny / "jobs.jsonl", base_model=tiny / "base", adapters_dir=tiny / "adapters")
    assert ended.code == 0, ended.err
    assert ended.summary["rows"] == len((tiny / "jobs.jsonl").read_text().splitlines()) > 5
    by_upper = [
        r["response"]["body"] for r in desk.results() if r["response"]["body"]["loramill"]["adapter"] == "upper"
    ]
    assert by_upper
    for body in by_upper:
        choice = body["choices"][0]
        assert (choice["message"]["content"] if "message" in choice else choice["text"]).isupper()
