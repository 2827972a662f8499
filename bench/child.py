"""One runner in a clean process, perhaps of another interpreter; its `Answers` as JSON in a file."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from bench import hide_root
from bench.job import Spec, prepare
from bench.peers.runner import runners

ENTRY = "import sys; from bench.child import main; main(*sys.argv[1:])"
"""For -c, with RUNNER SPEC CACHE OUT. Not -m: processes that vLLM spawns would import the main module again."""


def main(name: str, spec: str, cache: str, out: str) -> None:
    """Load and time that, run, write."""
    hide_root()
    warnings.simplefilter("ignore")
    runner = runners()[name]
    job = prepare(Spec(**json.loads(spec)), Path(cache))
    start = time.perf_counter()
    runner.load(job)
    load_s = time.perf_counter() - start
    answers = runner.run(job)
    if answers.load_s is None:
        answers.load_s = load_s
    Path(out).write_text(json.dumps(asdict(answers)))
