"""`python -m bench.gpu [PART]`: what `make gpu` runs: tests on a CUDA device, and the speed of kernels, engine, peers.

It needs torch, triton, transformers, safetensors, peft, numpy and pytest, and installs nothing. Results are JSON files
<device>-<part>.json in $OUT, or in bench/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT
from bench.parts import describe_part, no_device, save_part

PARTS = ("tests", "kernels", "engine", "peers")
MODULES = {"kernels": "bench.kernels", "engine": "bench.gpu_engine", "peers": "bench.gpu_peers"}
TESTS = ("tests/kernels", "tests/gpu")
SECONDS = 470
"""The most that one part may take."""


def pytest_command(report: Path) -> list[str]:
    """The tests of what runs on a device. Warnings of other versions than the pinned ones are no failures here."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "8"]  # most of the time is compiling
    # Compiling ahead of time for four architectures says nothing about this device.
    return [sys.executable, "-m", "pytest", *options, "--ignore=tests/kernels/test_aot.py", *TESTS]


def run_tests(arguments: Sequence[str]) -> int:
    """The interpreter's tests on the device, and tests/gpu; their counts as a result."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run([*pytest_command(report), *arguments], "tests")
        if not report.exists():
            return code or 1
        counts = count(report.read_text())
    save_part(describe_part("tests", ["make gpu PART=tests"]) | counts, whole=not arguments)
    return code


def count(report: str) -> dict[str, int]:
    """Passed, failed and skipped of a JUnit report."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    total, skipped, *bad = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped", "failures", "errors")
    )
    return {"passed": total - skipped - sum(bad), "failed": sum(bad), "skipped": skipped}


def run(command: Sequence[str], part: str) -> int:
    """A part in a process of its own, so that nothing stays on the device for the next one; its exit status."""
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"gpu: {part} took more than {SECONDS} seconds and was ended", file=sys.stderr)
        return 1


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    options, rest = parser.parse_known_args(arguments)
    if no_device(options.part):
        return 1
    if rest and options.part == "all":
        parser.error(f"{' '.join(rest)}: arguments go to one part, so name it")
    codes = []
    for part in PARTS if options.part == "all" else (options.part,):
        print(f"gpu: {part}", file=sys.stderr, flush=True)
        if part == "tests":
            codes.append(run_tests(rest))
        else:
            codes.append(run([sys.executable, "-m", MODULES[part], *rest], part))
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
