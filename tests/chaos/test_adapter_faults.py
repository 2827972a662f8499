"""An adapter whose files break under a running worker, with a real model."""

import shutil
from dataclasses import replace
from pathlib import Path

from tests.chaos.cluster import Cluster, rows_of
from tests.chaos.hooks import Chaos
from tests.chaos.oracle import Found

REAL = {"LORAMILL_CHILD": "", "LORAMILL_LEASE": "30s", "LORAMILL_DTYPE": "float32", "OMP_NUM_THREADS": "1"}


def test_rows_of_an_adapter_that_breaks_fail_by_name_and_all_others_are_answered(
    cluster: Cluster, tiny_base: Path, tiny_adapters: Path
) -> None:
    adapters = cluster.folder / "adapters"
    shutil.copytree(tiny_adapters, adapters)
    settings = {"LORAMILL_BASE_MODEL": str(tiny_base), "LORAMILL_ADAPTERS_DIR": str(adapters)}
    rows = rows_of(60, (None, "one", "two", "three"))
    worker = cluster.worker(chaos=Chaos(), **REAL, **settings)
    # What comes of it without a fault.
    output = cluster.folder / "whole.jsonl"
    run = ("run", "-i", str(cluster.write(rows)), "-o", str(output), "--base-model", str(tiny_base))
    code, _, err = cluster.command(*run, "--adapters-dir", str(tiny_adapters), "--device", "cpu", "--dtype", "float32")
    assert code == 0, err
    whole = [Found.of(line) for line in output.read_bytes().splitlines()]
    hashes = {found.adapter: found.sha256 for found in whole}
    cluster.ready()
    weights = adapters / "two" / "adapter_model.safetensors"
    truncated = weights.with_suffix(".new")
    truncated.write_bytes(weights.read_bytes()[:-100])
    truncated.replace(weights)
    job = cluster.submit(rows)
    for at, (expected, found) in enumerate(zip(rows.expected, whole, strict=True)):
        if expected.adapter == "two":
            rows.expected[at] = replace(expected, content="", status=500, code="adapter_unavailable")
        else:
            rows.expected[at] = replace(expected, content=found.content)
    cluster.finish(job, rows, hashes=hashes, base=tiny_base.name)
    assert "file not fully covered" in cluster.results(job)[1][0].decode()
    assert worker.code is None
