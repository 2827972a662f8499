"""vLLM's Triton kernels (`vllm/lora/ops/triton_ops`) from a checkout, on the operands of a point.

As vLLM calls them: fp32 buffer between shrink and expand, which shrink zeroes; expand adds to y; metadata as its
`LoRAKernelMeta` makes them, for exactly the adapters that are present (its graphs specialise on their number).
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.clock import Call
from bench.operands import Operands
from bench.peers.checkout import chosen, load

FOLDER = "vllm.lora.ops.triton_ops"


class Vllm:
    """Shrink and expand of vLLM."""

    name = "vllm"
    title = "vLLM's kernels"

    def __init__(self, root: Path) -> None:
        """`root` is a checkout of vLLM. Raises `AbsentError` when its kernels cannot be loaded."""
        names = ("utils", "kernel_utils", "lora_shrink_op", "lora_expand_op")
        files = {f"{FOLDER}.{name}": root / FOLDER.replace(".", "/") / f"{name}.py" for name in names}
        self._utils, _, shrink, expand = load("vllm", files, _stand_ins())
        # Without vLLM's registry of operators its modules fall back to the plain functions.
        self._shrink, self._expand = shrink.lora_shrink, expand.lora_expand

    def prepare(self, operands: Operands) -> Call:
        for kept in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
            getattr(self._utils, kept, {}).clear()  # by addresses, which the last point's tensors may have had
        siblings, device = range(len(operands.point.projection.widths)), operands.x.device
        a = [[one[:, i].contiguous() for i in siblings] for one in operands.a]
        b = [[one[:, :, c].transpose(1, 2).contiguous() for c in operands.columns()] for one in operands.b]
        buffer = torch.empty(len(siblings), operands.point.rows, operands.point.rank, device=device)
        metadata = _metadata(operands)

        def arguments(number: int) -> list[dict[str, Any]]:
            shrink = {"inputs": operands.x[number], "lora_a_weights": a[number], "output_tensor": buffer}
            shrink |= {"scaling": 1.0}
            expand = {"inputs": buffer, "lora_b_weights": b[number], "output_tensor": operands.y[number]}
            expand |= {"offset_start": 0, "add_inputs": True}
            return [chosen(self._shrink, metadata | shrink), chosen(self._expand, metadata | expand)]

        calls = [arguments(number) for number in range(operands.sets)]

        def call(number: int) -> None:
            shrink, expand = calls[number]
            self._shrink(**shrink)
            self._expand(**expand)

        return call


def _metadata(operands: Operands) -> dict[str, Tensor]:
    """As vLLM's `LoRAKernelMeta` has it, with room for every adapter and for rows of none."""
    room, device = operands.point.adapters + 1, operands.x.device
    segments = list(operands.segments())
    ids, counts, starts = [-1] * room, [0] * room, [0] * (room + 1)
    for place, (slot, first, last) in enumerate(segments):
        ids[place], counts[place], starts[place + 1] = slot, last - first, last

    def on_device(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    return {
        "token_lora_mapping": on_device(operands.slots),
        "token_indices_sorted_by_lora_ids": on_device(list(range(operands.point.rows))),
        "num_tokens_per_lora": on_device(counts),
        "lora_token_start_loc": on_device(starts),
        "lora_ids": on_device(ids),
        "no_lora_flag_cpu": torch.tensor([False]),
        "num_active_loras": torch.tensor([len(segments)], dtype=torch.int32),
    }


def _stand_ins() -> dict[str, dict[str, object]]:
    def register(**_: object) -> None:
        raise AttributeError("no registry of operators here")

    def once(*_: object) -> None:
        """Said once, and not here."""

    logger = SimpleNamespace(warning_once=once, info_once=once, warning=once, info=once, debug=once)
    envs = SimpleNamespace(
        VLLM_TUNED_CONFIG_FOLDER=os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_BATCH_INVARIANT=False,
    )
    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        has_device_capability=lambda least: torch.cuda.get_device_capability() >= divmod(least, 10),
        is_device_capability=lambda exactly: torch.cuda.get_device_capability() == divmod(exactly, 10),
    )

    def h2d(data: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(data, dtype=dtype, device=device)

    custom = {"direct_register_custom_op": register, "async_tensor_h2d": h2d}
    return {
        "vllm.triton_utils": {"triton": triton, "tl": tl, "HAS_TRITON": True},
        "vllm.envs": vars(envs),
        "vllm.logger": {"init_logger": lambda _: logger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.utils": custom,
        "vllm.utils.torch_utils": custom,
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.model_executor.layers.batch_invariant": {"vllm_is_batch_invariant": lambda: False},
    }
