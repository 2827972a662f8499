"""The kernel benchmark's own code on a CPU with a wall clock: what is right is timed, and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import kernels
from bench.clock import Call, ceilings, quantiles
from bench.gpu_report import section
from bench.kernels import measure, parse, peers
from bench.layer import layer_share
from bench.operands import Operands
from bench.peers.checkout import chosen, load
from bench.peers.kernel_forms import AbsentError, Gather, Loop, Ours
from bench.peers.sglang_kernels import chunk_rows, sglang_forms
from bench.peers.vllm_kernels import Vllm
from bench.points import Ceilings, Point, Projection

CPU = torch.device("cpu")
REACHED = Ceilings(copy=1e10, gemm=1e11)
POINTS = [
    Point("m", Projection("qkv", 64, (32, 16, 16)), rows=40, rank=8, adapters=5, popularity="zipf"),
    Point("m", Projection("o", 64, (48,)), rows=3, rank=16, adapters=7, popularity="uniform"),
    Point("m", Projection("o", 64, (48,)), rows=9, rank=16, adapters=1, popularity="uniform"),
]


def wall_clock(call: Call, sets: int) -> dict[str, float]:
    seconds = []
    for number in range(max(sets, 3)):
        started = time.perf_counter()
        call(number % sets)
        seconds.append(time.perf_counter() - started)
    return quantiles(seconds)


class Bad(Ours):
    """Gives `value` somewhere, or raises."""

    name = "bad"

    def __init__(self, value: float | Exception) -> None:
        self.value = value

    def prepare(self, operands: Operands) -> Call:
        right = super().prepare(operands)

        def call(number: int) -> None:
            right(number)
            if isinstance(self.value, Exception):
                raise self.value
            operands.y[number, -1, 0] = self.value

        return call


def measured(point: Point, *forms: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    found = measure(point, forms, wall_clock, REACHED, CPU, 4096, dtype)
    return {form.name: found["forms"][form.name] for form in forms}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_right_forms_are_timed(point: Point) -> None:
    found = measured(point, Ours(), Loop(), Gather())
    for name, one in found.items():
        assert one["error"] < 1e-2, name
        assert 0 < one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"]
        assert one["of_bound"] > 0


@pytest.mark.parametrize("value", [100.0, float("nan"), float("inf")])
def test_a_wrong_form_has_an_error_and_no_time(value: float) -> None:
    (found,) = measured(POINTS[0], Bad(value)).values()
    assert set(found) == {"wrong"}


def test_a_form_that_fails_takes_no_other_along() -> None:
    found = measured(POINTS[0], Bad(RuntimeError("no kernel image\nmore")), Ours())
    assert found["bad"] == {"failed": "RuntimeError: no kernel image"}
    assert "seconds" in found["loramill"]


def test_gathered_weights_that_are_too_large_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.peers.kernel_forms.GATHERED_BYTES", 100)
    (found,) = measured(POINTS[0], Gather()).values()
    assert "gathered weights would take" in found["absent"]


def test_ceilings_are_rates() -> None:
    found = ceilings(CPU, wall_clock, copy_bytes=1 << 20, size=64)
    assert found.copy > 0 < found.gemm


def test_a_layer_is_its_parts() -> None:
    small = (
        Projection("qkv", 32, (32, 16, 16)),
        Projection("o", 32, (32,)),
        Projection("gate_up", 32, (48, 48)),
        Projection("down", 48, (32,)),
    )
    found = layer_share(wall_clock, CPU, rank=8, rows=6, adapters=3, projections=small)
    assert set(found["seconds"]) == {"base", "with_lora", "lora_alone"}  # type: ignore[call-overload]
    assert found["alone_percent"] > 0  # type: ignore[operator]


def test_the_whole_command_with_its_device_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    properties = SimpleNamespace(L2_cache_size=4096)
    cuda = SimpleNamespace(
        current_device=lambda: 0, get_device_properties=lambda _: properties, empty_cache=lambda: None
    )
    monkeypatch.setattr(kernels, "torch", SimpleNamespace(cuda=cuda, device=lambda *_: CPU, bfloat16=torch.bfloat16))
    monkeypatch.setattr(kernels, "no_device", lambda _: False)
    monkeypatch.setattr(kernels, "graph_seconds", wall_clock)
    monkeypatch.setattr(kernels, "ceilings", lambda *_: REACHED)
    monkeypatch.setattr(kernels, "points", lambda: POINTS)
    monkeypatch.setattr(kernels, "layer_share", lambda _, __, rank: LAYER | {"rank": rank})
    assert kernels.main([]) == 0
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert [point["name"] for point in found["points"]] == [point.name for point in POINTS]
    assert set(found["points"][0]["forms"]) == {"loramill", "loop", "bmm"}
    assert "| m qkv, 40 rows, 5 zipf, rank 8 |" in section([found])
    assert kernels.main(["--minutes", "0", "--only", "o, 9"]) == 0
    assert json.loads(file.read_text())["skipped"] == ["m o, 9 rows, 1, rank 16"]


LAYER = {
    "rows": 256,
    "adapters": 32,
    "seconds": {"base": {"median": 1.0}},
    "added_percent": 2.0,
    "alone_percent": 1.0,
}
VLLM = {
    "utils": "from vllm import envs\nfrom vllm.utils.math_utils import next_power_of_2\n_LORA_A_PTR_DICT = {1: 2}\n",
    "kernel_utils": "from vllm.triton_utils import tl, triton\n",
    "lora_shrink_op": """
import torch
from vllm.lora.ops.triton_ops.utils import _LORA_A_PTR_DICT
from vllm.utils.torch_utils import direct_register_custom_op

def _lora_shrink(inputs, lora_a_weights, output_tensor, token_lora_mapping, token_indices_sorted_by_lora_ids,
                 num_tokens_per_lora, lora_token_start_loc, lora_ids, no_lora_flag_cpu, num_active_loras, scaling):
    assert not _LORA_A_PTR_DICT and not no_lora_flag_cpu.item()
    output_tensor.zero_()
    for i in range(num_active_loras.item()):
        first = lora_token_start_loc[i]
        rows = token_indices_sorted_by_lora_ids[first : first + num_tokens_per_lora[i]]
        for part, a in zip(output_tensor, lora_a_weights):
            part[rows] = inputs[rows].float() @ a[lora_ids[i]].float().t() * scaling

try:
    direct_register_custom_op(op_name="lora_shrink", op_func=_lora_shrink)
    lora_shrink = torch.ops.vllm.lora_shrink
except AttributeError:
    lora_shrink = _lora_shrink
""",
    "lora_expand_op": """
def lora_expand(inputs, lora_b_weights, output_tensor, token_lora_mapping, token_indices_sorted_by_lora_ids,
                num_tokens_per_lora, lora_token_start_loc, lora_ids, no_lora_flag_cpu,
                offset_start=0, add_inputs=False):
    assert add_inputs and len(lora_ids) + 1 == len(lora_token_start_loc)
    for row, slot in enumerate(token_lora_mapping.tolist()):
        column = offset_start
        for part, b in zip(inputs, lora_b_weights):
            output_tensor[row, column : column + b.shape[1]] += (b[slot].float() @ part[row]).to(output_tensor.dtype)
            column += b.shape[1]
""",
}
SGLANG = {
    "lora_tuning_config": "from sglang.srt.utils import get_device_name\n",
    "chunked_sgmv_shrink": """
from sglang.kernels.somewhere.lora_tuning_config import get_device_name
from sglang.srt.environ import envs
from sglang.srt.lora.utils import LoRABatchInfo
from sglang.srt.utils import cached_triton_kernel

def chunked_sgmv_lora_shrink_forward(x, weights, batch_info, num_slices, split_k=None):
    assert weights.shape[1] % num_slices == 0 and not envs.SGLANG_ANYTHING.get()
    v = x.new_empty(x.shape[0], weights.shape[1])
    for at, (first, slot) in enumerate(zip(batch_info.seg_indptr, batch_info.weight_indices)):
        last = batch_info.seg_indptr[at + 1]
        assert 0 < last - first <= batch_info.max_len
        v[first:last] = x[first:last] @ weights[slot].t()
    return v
""",
    "chunked_sgmv_expand": """
def chunked_sgmv_lora_expand_forward(x, weights, batch_info, slice_offsets, max_slice_size, base_output):
    rank = weights.shape[2]
    for at, (first, slot) in enumerate(zip(batch_info.seg_indptr, batch_info.weight_indices)):
        rows = slice(first, batch_info.seg_indptr[at + 1])
        for i in range(len(slice_offsets) - 1):
            columns = slice(slice_offsets[i], slice_offsets[i + 1])
            base_output[rows, columns] += x[rows, i * rank : (i + 1) * rank] @ weights[slot, columns].t()
    return base_output
""",
}


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, source in files.items():
        (folder / f"{name}.py").write_text(source)
    (folder / "__init__.py").write_text("raise RuntimeError('the package must not start')\n")


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_peers_from_a_checkout_get_their_own_layouts(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small twins of vLLM's and SGLang's functions, whose signatures and metadata are theirs."""
    clean_modules(monkeypatch)
    write(tmp_path / "vllm" / "lora" / "ops" / "triton_ops", VLLM)
    write(tmp_path / "python" / "sglang" / "kernels" / "somewhere", SGLANG)
    forms = [Vllm(tmp_path), *sglang_forms(tmp_path)]
    found = measured(point, *forms)
    assert set(found) == {"vllm", "sglang-16", "sglang-128"}
    for name, one in found.items():
        assert one.get("error", 1) < 1e-2, (name, one)


def clean_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "sglang")]:
        monkeypatch.delitem(sys.modules, name)


def test_chunks_are_as_high_as_the_server_makes_them() -> None:
    assert [chunk_rows(rows, 128) for rows in (1, 63, 64, 255, 256, 8192)] == [16, 16, 32, 32, 128, 128]
    assert chunk_rows(8192, 16) == 16


def test_what_cannot_be_loaded_is_absent_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_modules(monkeypatch)
    assert peers(parse([]))[1] == {
        "vllm": "no checkout was given (--vllm PATH)",
        "sglang": "no checkout was given (--sglang PATH)",
    }
    _, absent = peers(parse(["--vllm", str(tmp_path), "--sglang", str(tmp_path)]))
    assert absent["vllm"].startswith("there is no ")
    assert absent["sglang"].startswith("there is no chunked_sgmv_shrink.py in ")
    write(tmp_path / "vllm" / "lora" / "ops" / "triton_ops", VLLM | {"utils": "import vllm.engine\n"})
    _, absent = peers(parse(["--vllm", str(tmp_path)]))
    assert "it asks for vllm.engine, for which there is no stand-in" in absent["vllm"]


def test_an_argument_that_nobody_knows_is_no_guess(tmp_path: Path) -> None:
    def theirs(x: int, novel: int, optional: int = 0) -> None: ...

    assert chosen(lambda x, y=0: None, {"x": 1, "z": 2}) == {"x": 1}
    with pytest.raises(AbsentError, match="theirs asks for novel"):
        chosen(theirs, {"x": 1})
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(AbsentError, match="ZeroDivisionError"):
        load("broken_package", {"broken_package.broken": tmp_path / "broken.py"}, {})
