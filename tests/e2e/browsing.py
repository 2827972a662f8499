"""A headless Chromium, and a server with a stub worker for it to look at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.worker.queueing import ENVIRONMENT

MISSING = "chromium and chromedriver are not installed: install them (Debian: chromium, chromium-driver)"
WAIT_S = 60.0
TALL = 1700
_T = TypeVar("_T")


def chromium() -> tuple[str, str]:
    """Where the browser and its driver are. A missing one fails the test in CI, and skips it elsewhere."""
    found = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in found:
        if os.environ.get("CI"):
            pytest.fail(MISSING, pytrace=False)
        pytest.skip(MISSING)
    return found  # type: ignore[return-value]


class Browser:
    """Chromium at one page at a time."""

    def __init__(self, downloads: Path) -> None:
        binary, driver = chromium()
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        # A container's root has no sandbox, and its /dev/shm is small.
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.downloads = downloads
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.looks_like(1280)

    def close(self) -> None:
        self.driver.quit()

    def looks_like(self, width: int, scheme: str = "light", height: int = 900, *, motion: bool = True) -> None:
        """The window, and what the reader prefers."""
        frame = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", frame)
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "no-preference" if motion else "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        self.driver.get(url)

    def js(self, code: str, *arguments: Any) -> Any:
        """What this JavaScript returns."""
        return self.driver.execute_script(code, *arguments)

    def find(self, css: str) -> WebElement:
        """Waits until it is there."""
        return self.until(lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, css)), None), css)

    def text(self, css: str) -> str:
        return self.find(css).text

    def says(self, css: str, words: str) -> str:
        """Waits until an element says so; all that it says."""
        return self.until(lambda: said if words in (said := self.text(css)) else None, f"{css} says {words!r}")

    def press(self, *keys: str) -> None:
        """On the keyboard, one after another, wherever the focus is."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    @property
    def focused(self) -> str:
        """The id of the element with the focus."""
        return str(self.js("return document.activeElement.id"))

    def until(self, look: Callable[[], _T | None], what: str = "it") -> _T:
        """What `look` returns, as soon as that is something."""
        give_up_s = time.monotonic() + WAIT_S
        while True:
            try:
                if found := look():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < give_up_s, f"{what}: not in {WAIT_S:g} seconds; {self.page_words()}"
            time.sleep(0.05)

    def page_words(self) -> str:
        try:
            return " ".join(str(self.js("return document.body.innerText")).split())
        except WebDriverException as error:
            return str(error)

    def downloaded(self) -> list[dict[str, Any]]:
        """The lines of the file that was just downloaded, once it is whole."""
        path = self.until(lambda: next(self.downloads.glob("*.jsonl"), None), "a download")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return lines

    def complaints(self) -> list[str]:
        """What the browser's console said since it was last asked."""
        return [one["message"] for one in self.driver.get_log("browser") if one["level"] in ("WARNING", "SEVERE")]

    def drop(self, css: str, path: Path) -> None:
        """A file, as from the desktop."""
        target = self.find(css)
        self.js(
            "const input = document.createElement('input'); input.type = 'file'; input.id = 'dropping';"
            "input.className = 'unseen'; document.body.append(input)"
        )
        self.find("#dropping").send_keys(str(path))
        self.js(
            "const held = new DataTransfer(); const input = document.getElementById('dropping');"
            "held.items.add(input.files[0]); input.remove();"
            "for (const type of ['dragenter', 'dragover', 'drop'])"
            " arguments[0].dispatchEvent(new DragEvent(type, {dataTransfer: held, bubbles: true, cancelable: true}))",
            target,
        )

    def too_wide(self) -> list[str]:
        """What reaches out of the window, or out of the card that it is in."""
        found: list[str] = self.js(
            """
            const out = [], name = (one) => one.tagName + "#" + one.id + "." + one.getAttribute("class");
            if (document.documentElement.scrollWidth > innerWidth) out.push("the page");
            for (const one of document.querySelectorAll("body *")) {
              const box = one.getBoundingClientRect();
              const card = one.parentElement.closest(".card")?.getBoundingClientRect();
              if (!box.width || one.closest(".unseen, .skip, svg, thead")) continue;
              if (box.right > innerWidth + 1 || box.left < -1) out.push(name(one) + " and the window");
              if (box.right > card?.right + 1 || box.left < card?.left - 1) out.push(name(one) + " and its card");
            }
            return out;
            """
        )
        return found

    def picture(self, path: Path) -> None:
        """The page, as far down as a document wants it."""
        width, height = self.js("return [innerWidth, document.documentElement.scrollHeight]")
        frame = {"width": width, "height": min(height, TALL), "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", frame)
        self.driver.save_screenshot(str(path))


class Mill:
    """A server and a worker, as processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = f"sqlite:///{folder / 'jobs.db'}"
        self.url = ""
        self._processes: list[subprocess.Popen[str]] = []

    def serve(self, *flags: str) -> None:
        """Returns when it listens."""
        process = self._start("serve", "--port", "0", *flags)
        assert process.stderr is not None
        for line in process.stderr:
            if "listening on" in line:
                self.url = line.split()[-1]
                break
        assert self.url, "the server did not start"
        self.server = process

    def work(self, **environment: str) -> None:
        """A worker of the stub."""
        self._start("worker", "--base-model", "stub", "--device", "cpu", **environment)

    def write(self, name: str, lines: Iterable[dict[str, Any] | str]) -> Path:
        """A file to submit."""
        path = self.folder / name
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
        return path

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.communicate(timeout=30)

    def _start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        code = "from loramill.producer.cli import main; main()"
        log = subprocess.PIPE if command[0] == "serve" else subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command, "--store", self.store],
            stderr=log, stdin=subprocess.DEVNULL, text=True, env={**os.environ, **ENVIRONMENT, **environment},
        )  # fmt: skip
        self._processes.append(process)
        return process


@contextmanager
def running(folder: Path, *flags: str) -> Iterator[Mill]:
    """A server, until the block ends."""
    folder.mkdir(exist_ok=True)
    mill = Mill(folder)
    try:
        mill.serve(*flags)
        yield mill
    finally:
        mill.close()


def batch_lines(prompts: Sequence[str], model: str = "") -> list[dict[str, Any]]:
    """Lines of a batch, one a prompt."""
    return [
        {
            "custom_id": f"r{row}", "method": "POST", "url": "/v1/completions",
            "body": {"model": model or f"a{row % 4:02}", "prompt": prompt, "max_tokens": 16},
        }
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip
