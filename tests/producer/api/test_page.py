"""The page without a browser: who sees what, what can be done, and that nothing of others' words becomes markup."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.producer.api import page, page_reading
from loramill.producer.api.job_actions import lines_of
from loramill.schemas.job import JobError, JobNames, JobStatus, Pinned
from loramill.store.errors import StoreUnreachable
from loramill.store.packing import Chunk
from loramill.store.records import WorkerRecord
from tests.producer.api.paged import Seen, Site
from tests.producer.queued import done_row
from tests.producer.served_by_stub import MANIFEST, rows

NASTY = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>.jsonl'


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    with made.store:
        yield made


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, with_keys=True)
    with made.store:
        yield made


def see(site: Site, path: str, who: str | None = None, status: int = 200) -> Seen:
    answer = site.client(who).get(path)
    assert answer.status_code == status, answer.text
    return Seen(answer.text)


def test_jobs_with_their_progress_and_failures(site: Site) -> None:
    done = site.place.submit(rows(10), id="half-failed").job
    site.place.work(fail={f"r{row}" for row in range(4)})
    site.job("open", 8)
    page = see(site, "/")
    assert page.jobs == ["open", "half-failed"]
    assert "6 of 10" not in page.words and "10 of 10 · 4 failed" in page.words
    assert "0 of 8" in page.words
    one = see(site, f"/jobs/{done.id}")
    assert "engine_error 4 no r0" in one.words
    assert {"/jobs/half-failed/results", "/jobs/half-failed/errors", "/jobs/half-failed/retry"} <= one.links
    [bar] = one.all("progress")
    assert (bar["value"], bar["max"]) == ("10", "10") and bar["aria-label"]


def test_fragments_are_what_of_the_page_changes(site: Site) -> None:
    site.job("one", 8)
    for whole, part in (("/", "/fragments/overview"), ("/jobs/one", "/fragments/jobs/one")):
        ids = {str(one["id"]) for one in see(site, part).all("section")}
        assert ids and ids <= {str(one.get("id")) for one in see(site, whole).all("section")}
        assert see(site, whole).all("body")[0]["data-live"] == part


def test_an_ended_job_s_page_is_not_asked_for_again(site: Site) -> None:
    site.job("one", 8)
    site.place.work()
    assert see(site, "/jobs/one").all("body")[0]["data-live"] == ""


def test_every_job_is_on_one_page_of_the_list(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_reading, "PAGE", 7)
    made = []
    for number in range(20):
        if number % 5 == 3:
            made.append(site.running_batch("", 4).id)
        elif number % 5 == 4:
            made.append(site.batch("").id)
        else:
            made.append(site.job(f"job-{number}", 4).id)
    found, path, pages = list[str](), "/", 0
    while path:
        page = see(site, path)
        found += page.jobs
        pages += 1
        older = page.all("a", id="older")
        path = str(older[0]["href"]) if older else ""
    assert pages == 3
    # Jobs and batches of one millisecond may change places.
    assert sorted(found) == sorted(made)
    assert [made.index(id) for id in found] == pytest.approx(range(19, -1, -1), abs=1)


def test_a_key_s_own_list_goes_on_too(keyed: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_reading, "PAGE", 2)
    made = [keyed.batch(owner).id for owner in ("ann", "bob", "ann", "ann")]
    first = see(keyed, "/", "ann")
    rest = see(keyed, str(first.all("a", id="older")[0]["href"]), "ann")
    assert sorted([*first.jobs, *rest.jobs]) == sorted(id for at, id in enumerate(made) if at != 1)
    assert len(rest.jobs) == 1 and not rest.all("a", id="older") and rest.all("a", id="newest")


def test_a_list_whose_last_page_is_gone_begins_anew(site: Site) -> None:
    site.job("one", 4)
    assert see(site, "/?job=purged&batch=").jobs == ["one"]


def test_what_others_have_is_not_there(keyed: Site) -> None:
    command, anns = keyed.job("command", 8), keyed.running_batch("ann")
    refused = keyed.batch("ann", status=JobStatus.FAILED, errors=(JobError(code="x", message="secret words", line=3),))
    assert see(keyed, "/", "ops").jobs == [refused.id, anns.id, command.id]
    assert see(keyed, "/", "ann").jobs == [refused.id, anns.id]
    assert see(keyed, "/", "bob").jobs == []
    for id, strangers in ((command.id, ("ann", "bob")), (anns.id, ("bob",)), (refused.id, ("bob",))):
        for who in strangers:
            client = keyed.client(who)
            for path in (f"/jobs/{id}", f"/fragments/jobs/{id}", f"/jobs/{id}/results", f"/jobs/{id}/errors"):
                assert client.get(path).status_code == 404, path
            for path in (f"/jobs/{id}/cancel", f"/jobs/{id}/retry"):
                assert client.post(path).status_code == 404, path
    assert keyed.store.job(command.id).status is JobStatus.IN_PROGRESS


def test_an_operator_sees_another_s_batch_but_not_its_words(keyed: Site) -> None:
    anns = keyed.running_batch("ann")
    keyed.place.work(fail={"r1"})
    refused = keyed.batch("ann", status=JobStatus.FAILED, errors=(JobError(code="x", message="secret words", line=3),))
    mine = see(keyed, f"/jobs/{anns.id}", "ann")
    theirs = see(keyed, f"/jobs/{anns.id}", "ops")
    assert "engine_error 1 no r1" in mine.words
    assert "engine_error 1" in theirs.words and "r1" not in theirs.words.split()
    assert not [link for link in theirs.links if "/results" in link or "/v1/" in link]
    assert "secret words" in see(keyed, f"/jobs/{refused.id}", "ann").words
    assert "secret words" not in see(keyed, f"/jobs/{refused.id}", "ops").words
    assert keyed.client("ops").get(f"/jobs/{anns.id}/results").status_code == 404


def test_an_operator_may_cancel_another_s_batch(keyed: Site) -> None:
    anns = keyed.running_batch("ann")
    assert see(keyed, f"/jobs/{anns.id}", "ann").links >= {f"/v1/batches/{anns.id}/cancel"}
    assert see(keyed, f"/jobs/{anns.id}", "ops").links >= {f"/jobs/{anns.id}/cancel"}
    assert keyed.client("ops").post(f"/jobs/{anns.id}/cancel").json() == {"id": anns.id}
    assert keyed.store.job(anns.id).status is JobStatus.CANCELLED


def test_a_question_is_no_job_of_the_page(site: Site) -> None:
    site.job("ask_1", 1, lane="ask")
    assert see(site, "/").jobs == []
    assert site.client().get("/jobs/ask_1").status_code == 404


@pytest.mark.parametrize("path", ["/jobs/none", "/fragments/jobs/none", "/jobs/batch_000000000000000000000000"])
def test_a_page_that_is_not_there_is_one_for_people(site: Site, path: str) -> None:
    assert "No such job" in see(site, path, status=404).words


def test_results_and_errors_in_input_order(site: Site) -> None:
    job = site.place.submit(rows(30), id="one").job
    site.place.work(fail={"r3", "r20"})
    client = site.client()
    results, errors = client.get(f"/jobs/{job.id}/results"), client.get(f"/jobs/{job.id}/errors")
    answered = [json.loads(line)["custom_id"] for line in results.text.splitlines()]
    assert answered == [f"r{row}" for row in range(30) if row not in (3, 20)]
    assert [json.loads(line)["custom_id"] for line in errors.text.splitlines()] == ["r3", "r20"]
    assert results.headers["content-disposition"] == 'attachment; filename="one.jsonl"'


def test_rows_that_never_ran_are_among_the_errors(site: Site) -> None:
    site.job("one", 8)
    site.client().post("/jobs/one/cancel")
    lines = [json.loads(line) for line in site.client().get("/jobs/one/errors").text.splitlines()]
    assert [line["error"]["code"] for line in lines] == ["batch_cancelled"] * 8
    assert site.client().get("/jobs/one/results").text == ""


def test_results_take_no_memory(site: Site) -> None:
    size, total, a_chunk = 4000, 6000, 32
    site.place.submit(rows(total), id="large")
    while claim := site.store.claim("w", MANIFEST.id):
        mine = site.store.read_shard("large", claim.lease.shard)
        done = [done_row("large", *row, text="x" * size) for row in mine]
        for start in range(0, len(done), a_chunk):
            some = done[start : start + a_chunk]
            site.store.commit(claim.lease, Chunk.of(some, range(start, start + len(some))))
    tracemalloc.start()
    try:
        came = sum(len(part) for part in lines_of(site.store, site.store.job("large"), failed=False))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert came > size * total
    assert peak < came / 3


def test_retry_is_a_new_job_of_what_failed(site: Site) -> None:
    site.place.submit(rows(6), id="one")
    site.place.work(fail={"r2", "r4"})
    client = site.client()
    new = client.post("/jobs/one/retry").json()["id"]
    assert site.store.job(new).total == 2
    assert "one" in see(site, f"/jobs/{new}").words
    assert client.post(f"/jobs/{new}/retry").json()["error"]["code"] == "not_retried"  # it has not ended
    site.place.work()
    assert client.post(f"/jobs/{new}/retry").json()["error"]["code"] == "nothing_to_retry"


def test_without_script_a_button_leads_to_the_job(site: Site) -> None:
    site.job("one", 4)
    answer = site.client().post("/jobs/one/cancel", headers={"accept": "text/html,*/*"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs/one")


def test_another_site_s_page_can_do_nothing(site: Site) -> None:
    site.job("one", 4)
    assert site.client().post("/jobs/one/cancel", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert site.store.job("one").status is JobStatus.IN_PROGRESS


def test_a_batch_before_and_after_its_job(site: Site) -> None:
    early = site.batch("")
    assert "validating" in see(site, f"/jobs/{early.id}").words
    assert see(site, f"/jobs/{early.id}").links >= {f"/v1/batches/{early.id}/cancel"}
    errors = tuple(JobError(code="invalid_json_line", message=f"line {at}", line=at) for at in (2, 5))
    site.book.change(early, status=JobStatus.FAILED, errors=errors)
    refused = see(site, f"/jobs/{early.id}")
    assert "2 line 2 invalid_json_line" in refused.words and "5 line 5" in refused.words
    assert "2 invalid lines" in see(site, "/").words
    # Of a batch whose job was removed the record has the counts, and its files are where they were.
    ended = {"status": JobStatus.COMPLETED, "total": 9, "completed": 7, "failed": 2, "submits": 1, "in_progress_ms": 1}
    files = {"output_file_id": "file-1", "error_file_id": "file-2", "ended_ms": 2001}
    old = see(site, f"/jobs/{site.batch('', **ended, **files).id}")
    assert "9 of 9" in old.words and "took" in old.words.lower()
    assert {"/v1/files/file-1/content", "/v1/files/file-2/content"} <= old.links


def test_workers_and_adapters(site: Site) -> None:
    site.place.hello("w1", MANIFEST)
    said = WorkerRecord(
        "w2", MANIFEST.id, MANIFEST.base_id, "cuda:0", "loading", 1, 2, "gpu-host", ("key-03",), 5, 2,
        refused={"broken": "rank 512 is too much"},
    )  # fmt: skip
    site.store.hello(said)
    job_names = JobNames(base="stub", adapters={"a05": Pinned(key="key-05")})
    site.job("uses-a05", 4, names=job_names)
    page.reading_of(site.api)
    site.api.shared["throughput"].look()
    words = see(site, "/").words
    assert "Workers ready 1 of 2" in words
    assert "cuda:0 stub w2 · gpu-host 1 in slots: a03 loading 2 restarts 5" in words
    assert "Running jobs 1 Rows to go 4" in words
    assert "broken: rank 512 is too much" in words
    assert "16 served a05 rank 8 1 job a03 rank 8 resident on 1 a00 rank 8 idle" in words


def test_who_is_no_operator_sees_no_machines(keyed: Site) -> None:
    said = WorkerRecord("w2", MANIFEST.id, MANIFEST.base_id, "cuda:0", "ready", 1, 2, "gpu-host", ("key-03", "key-04"))
    keyed.store.hello(said)
    assert "gpu-host" in see(keyed, "/", "ops").words
    words = see(keyed, "/", "ann").words
    assert "cuda:0" in words and "gpu-host" not in words and "w2" not in words.split()
    # Bob may use one adapter: of the others he sees no names.
    assert re.findall(r"a\d\d", see(keyed, "/", "bob").words) == ["a03", "a03"]


def test_nothing_that_others_wrote_becomes_markup(site: Site) -> None:
    site.job("one", 4, input_name=NASTY, metadata={NASTY: NASTY})
    site.store.hello(WorkerRecord(NASTY, MANIFEST.id, MANIFEST.base_id, NASTY, "ready", 1, 2, NASTY, (NASTY,)))
    site.batch("", status=JobStatus.FAILED, errors=(JobError(code=NASTY, message=NASTY, param=NASTY, line=1),))
    for path in ("/", "/jobs/one", *(f"/jobs/{id}" for id in see(site, "/").jobs), "/jobs/<img src=x>"):
        found = Seen(site.client().get(path).text)
        assert found.all("img") == []
        assert [one.get("src") for one in found.all("script")] == [f"/static/page.js?v={page._BUILD}"]
        assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]


def test_every_page_has_the_policy(site: Site) -> None:
    for path in ("/", "/fragments/overview", "/jobs/none", "/fragments/jobs/none"):
        headers = site.client().get(path).headers
        assert headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        assert headers["cache-control"] == "no-store"


def test_without_a_key_there_is_only_the_form(keyed: Site) -> None:
    keyed.job("hidden-from-strangers", 4)
    answer = keyed.client().get("/")
    assert answer.status_code == 401
    found = Seen(answer.text)
    assert [one["action"] for one in found.all("form")] == ["/login"]
    [style] = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    assert "hidden-from-strangers" not in answer.text
    for path in ("/jobs/hidden-from-strangers", "/fragments/overview", "/static/page.js"):
        assert keyed.client().get(path).status_code == 401
    assert "That key is not known." in Seen(keyed.client().post("/login", data={"key": "wrong"}).text).words


def test_a_key_signs_in_and_out(keyed: Site) -> None:
    keyed.job("command", 4)
    client = keyed.client()
    there = {"origin": "http://127.0.0.1"}
    assert client.post("/login", data={"key": "ops"}, headers=there).status_code == 303
    found = Seen(client.get("/").text)
    assert found.jobs == ["command"] and "ops operator Sign out" in found.words
    assert client.post("/logout", headers=there).status_code == 303
    assert client.get("/").status_code == 401


def test_the_script_and_the_style_are_asked_for_once(site: Site) -> None:
    found = see(site, "/")
    for path in (str(found.all("script")[0]["src"]), str(found.all("link", rel="stylesheet")[0]["href"])):
        answer = site.client().get(path)
        assert "immutable" in answer.headers["cache-control"]
        again = site.client().get(path.partition("?")[0], headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert site.client().get("/static/page.py").status_code == 404


def test_a_store_that_is_away_is_said_in_words(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise StoreUnreachable("redis://secret-host:6379 does not answer")

    monkeypatch.setattr(site.store, "workers", away)
    words = see(site, "/", status=503).words
    assert "The store does not answer; try again" in words and "secret-host" not in words


def test_a_file_is_shown_without_its_folder(site: Site) -> None:
    site.place.submit(rows(2))
    words = see(site, "/").words
    assert "in.jsonl" in words and site.place.folder.name not in words
