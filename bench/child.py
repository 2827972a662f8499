"""`python -m bench.child RUNNER SPEC CACHE OUT`: one runner in a clean process; its `Answers` as JSON in OUT."""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from bench import hide_root
from bench.job import Spec, prepare
from bench.peers.runner import runners


def main(name: str, spec: str, cache: str, out: str) -> None:
    """Load and time that, run, write."""
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


if __name__ == "__main__":
    hide_root()
    main(*sys.argv[1:])
