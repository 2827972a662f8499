"""The page in a real Chromium: a file dropped, watched, downloaded, refused, cancelled, retried; narrow and wide, light
and dark, by keyboard alone, without script.

Pictures of it go to the folder that LORAMILL_SCREENSHOTS names, if there is one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.e2e.browsing import Browser, Mill, batch_lines, running

SCREENSHOTS = Path(given) if (given := os.environ.get("LORAMILL_SCREENSHOTS")) else None
PICTURES = {path.name for path in (Path(__file__).parents[2] / "docs" / "dashboard").glob("*.png")}
"""Those that the documents have."""
DETAIL = re.compile(r"/jobs/(batch_[0-9a-f]{24})")


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    with running(tmp_path_factory.mktemp("mill")) as mill:
        mill.work(STUB_STEP_S="0.01")
        yield mill


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chrome: Browser, mill: Mill) -> Iterator[Browser]:
    """At the page, when the worker is there; its console must have nothing to complain of."""
    chrome.looks_like(1280)
    chrome.open(mill.url)
    chrome.says("#stats", "Workers ready\n1")
    chrome.complaints()
    yield chrome
    assert chrome.complaints() == []


def submit(browser: Browser, path: Path) -> None:
    """By the file dialog."""
    browser.find("#file").send_keys(str(path))


def sent(browser: Browser) -> str:
    """The id of what was submitted last."""
    found = DETAIL.search(str(browser.find("#sent").get_attribute("href")))
    assert found
    return found[1]


def submitted(browser: Browser, mill: Mill, name: str, prompts: list[str]) -> str:
    """A batch of these prompts; its id once it was accepted."""
    submit(browser, mill.write(name, batch_lines(prompts)))
    browser.says("#sending-words", f"is accepted: {len(prompts)} rows")
    return sent(browser)


def test_a_file_is_dropped_watched_and_downloaded(browser: Browser, mill: Mill) -> None:
    browser.drop("#drop", mill.write("hello.jsonl", batch_lines([f"hello {row}" for row in range(40)])))
    browser.says("#sending", "hello.jsonl is accepted: 40 rows.")
    id = sent(browser)
    browser.says(f"#job-{id}", "completed")
    assert "40 of 40" in browser.text(f"#job-{id}")
    assert browser.until(lambda: "hello.jsonl is completed" in browser.text("#said") or None)
    browser.find(f"#results-{id}").click()
    lines = browser.downloaded()
    assert [line["custom_id"] for line in lines] == [f"r{row}" for row in range(40)]
    assert lines[7]["response"]["body"]["choices"][0]["text"] == "ok:hello 7"


def test_a_file_with_bad_lines_says_which(browser: Browser, mill: Mill) -> None:
    good = batch_lines(["fine"] * 4)
    lines = [good[0], "{not json", good[1], good[1], {**good[2], "body": {"model": "nobody", "prompt": "x"}}]
    submit(browser, mill.write("bad.jsonl", lines))
    browser.says("#sending", "bad.jsonl was refused: 3 invalid lines. Nothing ran.")
    said = [one.text for one in browser.driver.find_elements(By.CSS_SELECTOR, "#problems li")]
    assert [one.split(" ")[:2] for one in said] == [["Line", "2"], ["Line", "4"], ["Line", "5"]]
    assert "invalid_json_line" in said[0] and "duplicate_custom_id" in said[1] and "model_not_found" in said[2]
    browser.find("#sent").click()
    browser.says("#refused", "Why its input was refused")
    assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#refused tbody tr")) == 3


def test_bad_lines_can_be_skipped(browser: Browser, mill: Mill) -> None:
    browser.find("#skip").click()
    submit(browser, mill.write("skip.jsonl", [*batch_lines(["fine"] * 3), "{not json"]))
    browser.says("#sending", "skip.jsonl is accepted")
    browser.says(f"#job-{sent(browser)}", "1 failed")


def test_what_is_no_batch_is_refused_at_once(browser: Browser, mill: Mill) -> None:
    submit(browser, mill.write("notes.txt", ["hello"]))
    browser.says("#notice", "notes.txt")
    assert "was not submitted" in browser.text("#sending")
    assert [one for one in browser.complaints() if "400" not in one] == []  # the browser's own line about the answer


def test_cancelled_midway_and_the_rest_retried(browser: Browser, mill: Mill) -> None:
    id = submitted(browser, mill, "long.jsonl", ["SLOW"] * 600)
    browser.until(lambda: re.search(r"[1-9]\d* of 600", browser.text(f"#job-{id}")), "some rows")
    browser.find(f"#cancel-{id}").click()
    assert browser.find("#sure").get_attribute("open") is not None
    browser.find("#sure [value=yes]").click()
    browser.says(f"#job-{id}", "cancelled")
    words = browser.says(f"#job-{id}", "never ran")
    never_ran = int(re.findall(r"(\d+) never ran", words)[0])
    assert 0 < never_ran < 600
    browser.find(f"#errors-{id}").click()
    codes = [line["error"]["code"] for line in browser.downloaded()]
    assert codes == ["batch_cancelled"] * never_ran
    browser.find(f"#retry-{id}").click()
    browser.until(lambda: id not in browser.driver.current_url and "/jobs/" in browser.driver.current_url)
    browser.says("#job", f"of {never_ran}")
    browser.find("#job [id^=cancel-]").click()
    browser.find("#sure [value=yes]").click()
    browser.says("#job", "cancelled")
    assert browser.find("#retry-of").text == id


def test_failures_with_their_reasons_and_a_retry(browser: Browser, mill: Mill) -> None:
    prompts = ["OOM1 never" if row % 5 == 0 else f"fine {row}" for row in range(20)]
    id = submitted(browser, mill, "mixed.jsonl", prompts)
    browser.says(f"#job-{id}", "4 failed")
    browser.says(f"#job-{id}", "completed")
    browser.find(f"#open-{id}").click()
    assert "out_of_memory" in browser.says("#failures", "4")
    assert "out of memory" in browser.text("#failures .example")
    browser.find(f"#retry-{id}").click()
    browser.until(lambda: id not in browser.driver.current_url)
    browser.says("#job", "Retry of")
    browser.says("#job", "4 of 4")


@pytest.fixture(scope="module")
def shown(chrome: Browser, mill: Mill) -> Iterator[str]:
    """A batch with failures of several kinds, while another runs."""
    chrome.looks_like(1280)
    chrome.open(mill.url)
    chrome.find("#skip").click()
    prompts = ["OOM1" if row == 60 else f"ticket {row}" for row in range(120)]
    lines = [*batch_lines(prompts), "{not json", *batch_lines(["x"], "sql-v9"), "[]"]
    submit(chrome, mill.write("support-tickets.jsonl", lines))
    chrome.says("#sending-words", "is accepted: 123 rows")
    failed = sent(chrome)
    chrome.says(f"#job-{failed}", "123 of 123")
    submit(chrome, mill.write("nightly-summaries.jsonl", batch_lines(["SLOW"] * 900)))
    chrome.says("#sending", "nightly-summaries.jsonl is accepted")
    running = sent(chrome)
    chrome.until(lambda: re.search(r"[1-9]\d* of 900", chrome.text(f"#job-{running}")), "some rows")
    yield failed
    chrome.open(mill.url)
    chrome.js(f"return fetch('/v1/batches/{running}/cancel', {{method: 'POST'}})")


WINDOWS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark"), (1024, "light"), (760, "dark")]


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_it_is_readable(browser: Browser, mill: Mill, shown: str, tmp_path: Path, width: int, scheme: str) -> None:
    for name, url in (("overview", mill.url), ("job", f"{mill.url}/jobs/{shown}")):
        browser.looks_like(width, scheme, motion=False)
        browser.open(url)
        browser.find("#failures" if name == "job" else "#chart path.edge")
        assert "; ".join(browser.too_wide()) == ""
        ground = browser.js("return getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(246, 246, 244)", "dark": "rgb(18, 19, 23)"}[scheme]
        picture = f"{name}-{width}-{scheme}.png"
        browser.picture(SCREENSHOTS / picture if SCREENSHOTS and picture in PICTURES else tmp_path / picture)


def test_by_keyboard_alone(browser: Browser, mill: Mill) -> None:
    id = submitted(browser, mill, "keys.jsonl", ["SLOW"] * 400)
    browser.find(f"#cancel-{id}")
    browser.open(mill.url)
    browser.find(f"#cancel-{id}")
    reached, unseen = list[str](), list[str]()
    for _ in range(200):
        browser.press(Keys.TAB)
        here = browser.js(
            "const one = document.activeElement, shown = one.id === 'file' ? document.querySelector('.zone') : one;"
            "const style = getComputedStyle(shown), box = shown.getBoundingClientRect();"
            "const seen = style.outlineStyle !== 'none' && box.width > 4 && box.height > 4;"
            "return [one.id || one.textContent.trim(), seen]"
        )
        reached.append(here[0])
        if not here[1]:
            unseen.append(here[0])
        if here[0] == f"cancel-{id}":
            break
    assert reached[0] == "Skip to content" and unseen == []
    assert {"file", "skip", f"open-{id}"} <= set(reached)
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.js("return document.activeElement.textContent") == "Keep it running" or None)
    browser.press(Keys.ESCAPE)
    browser.until(lambda: browser.focused == f"cancel-{id}" or None)
    browser.press(Keys.SPACE)
    browser.until(lambda: browser.js("return document.activeElement.textContent") == "Keep it running" or None)
    browser.press(Keys.TAB, Keys.ENTER)
    browser.says(f"#job-{id}", "cancelled")


def test_what_changes_leaves_the_reader_where_he_is(browser: Browser, mill: Mill) -> None:
    id = submitted(browser, mill, "stays.jsonl", ["SLOW"] * 300)
    browser.looks_like(1280, height=400)
    browser.find("#chart-figures summary").click()
    browser.js(f"document.getElementById('open-{id}').focus(); scrollTo(0, 180)")
    browser.js(f"window.row = document.getElementById('job-{id}')")
    words = browser.text(f"#job-{id}")
    browser.until(lambda: browser.text(f"#job-{id}") != words or None, "a change")
    assert browser.js(f"return window.row === document.getElementById('job-{id}')")
    assert (browser.focused, browser.js("return scrollY")) == (f"open-{id}", 180)
    assert browser.find("#chart-figures").get_attribute("open") is not None
    browser.js(f"return fetch('/v1/batches/{id}/cancel', {{method: 'POST'}})")
    browser.says(f"#job-{id}", "cancelled")


def test_a_hidden_page_asks_for_nothing(browser: Browser) -> None:
    looks = "return performance.getEntriesByType('resource').filter((one) => one.name.includes('/fragments/')).length"
    browser.until(lambda: browser.js(looks) >= 2 or None)
    hide = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => %s});"
    tell = "document.dispatchEvent(new Event('visibilitychange'));"
    browser.js(hide % "true" + tell)
    # What was asked before may still be answered; time has to pass for nothing to happen.
    browser.js("window.since = performance.now()")
    browser.until(lambda: browser.js("return performance.now() - window.since > 1000") or None)
    before = browser.js(looks)
    browser.until(lambda: browser.js("return performance.now() - window.since > 4000") or None)
    assert browser.js(looks) == before
    browser.js(hide % "false" + tell)
    browser.until(lambda: browser.js(looks) > before or None)


def test_it_can_be_read_without_script(browser: Browser, mill: Mill) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(mill.url)
        assert browser.driver.find_elements(By.CSS_SELECTOR, "#jobs .what a")
        assert "Submitting needs JavaScript here" in browser.text("#submit")
        assert browser.driver.find_elements(By.CSS_SELECTOR, "meta[http-equiv=refresh]")
        browser.find("#jobs .what a").click()
        assert browser.driver.find_elements(By.CSS_SELECTOR, "#job .facts")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_with_keys_one_signs_in_and_a_server_that_is_gone_is_said(chrome: Browser, tmp_path: Path) -> None:
    from loramill.producer.api.keys import Key, hash_of, write_keys

    write_keys(tmp_path / "keys.toml", {"ann": Key(sha256=hash_of("lm-ann"))})
    with running(tmp_path / "keyed", "--keys", str(tmp_path / "keys.toml")) as mill:
        chrome.looks_like(400, "dark")
        chrome.open(mill.url)
        assert chrome.too_wide() == []
        assert chrome.focused == "key"
        chrome.press("wrong", Keys.ENTER)
        chrome.says("form", "That key is not known.")
        chrome.find("#key").send_keys("lm-ann", Keys.ENTER)
        chrome.says(".who", "ann")
        chrome.says("#jobs", "No jobs yet")
        assert chrome.too_wide() == []
        submit(chrome, mill.write("mine.jsonl", batch_lines(["x"])))
        chrome.says("#jobs", "mine.jsonl")
        assert [one for one in chrome.complaints() if "401" not in one] == []  # of the form before the key
        chrome.find(".who button").click()
        chrome.find("#key").send_keys("lm-ann", Keys.ENTER)
        chrome.says("#pulse", "Live")
        mill.close()
        chrome.says("#pulse", "Connection lost, trying again")
        chrome.complaints()
