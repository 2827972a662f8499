"""What the multi-LoRA operators accept, and the live ranks that they are told.

Everything the host can see is checked here, at every call. Numbers that stand on the device are checked where the host
makes them: slots and weights in `Mixes.of`, rows in `route_host`, ranks in `LiveRanks.put`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIBLINGS = 4


class LiveRanks:
    """The rank that each sibling projection uses in each slot: lists for the host, `tensor` [S, siblings] int32.

    `version` counts what was put, so that whoever keeps something made from the slots' weights knows when it is old.
    """

    def __init__(self, slots: int, siblings: int, device: torch.device) -> None:
        self.lists = [[0] * siblings for _ in range(slots)]
        self.tensor = torch.zeros(slots, siblings, dtype=torch.int32, device=device)
        self.largest = 0
        self.version = 0

    def __getitem__(self, slot: int) -> list[int]:
        return self.lists[slot]

    def __len__(self) -> int:
        return len(self.lists)

    def put(self, slot: int, ranks: Sequence[int]) -> None:
        """Set a slot's ranks, 0 where its adapter leaves a sibling alone.

        Raises:
            ValueError: a slot or a rank is out of range.
        """
        if not 0 <= slot < len(self.lists):
            raise ValueError(f"slot must be from 0 to {len(self.lists) - 1}, not {slot}")
        if len(ranks) != self.tensor.shape[1] or min(ranks) < 0:
            raise ValueError(f"ranks must be {self.tensor.shape[1]} numbers, none below 0, not {list(ranks)}")
        self.lists[slot] = list(ranks)
        self.largest = max(map(max, self.lists))
        self.version += 1
        self.tensor[slot] = torch.tensor(self.lists[slot], dtype=torch.int32)


def check_rows(name: str, rows: Tensor, like: Tensor) -> None:
    """A matrix whose rows a kernel walks.

    Raises:
        ValueError: it is not a matrix, its numbers do not stand side by side, or its dtype or device is another's.
    """
    if rows.ndim != 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(
            f"{name} must be a matrix whose last dimension is contiguous, "
            f"not {tuple(rows.shape)} with strides {rows.stride()}"
        )
    if rows.dtype is not like.dtype or rows.dtype not in DTYPES:
        raise ValueError(f"{name} must be {like.dtype} as its weights, one of {DTYPES}, not {rows.dtype}")
    if rows.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as its weights, not {rows.device}")


def check_weights(name: str, weights: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Contiguous weights of a known shape.

    Raises:
        ValueError: the shape, dtype, device or layout does not fit.
    """
    if tuple(weights.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(weights.shape)}")
    if weights.dtype is not like.dtype or weights.device != like.device:
        raise ValueError(f"{name} must be {like.dtype} on {like.device}, not {weights.dtype} on {weights.device}")
    if not weights.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not with strides {weights.stride()}")


def check_operands(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, ranks: LiveRanks, widths: Sequence[int], rows: int
) -> None:
    """The operands of one multi-LoRA call over `rows` routed rows.

    Raises:
        ValueError: one does not fit; the message names it and says what it must be.
    """
    if a.ndim != 4 or not 1 <= a.shape[1] <= MAX_SIBLINGS or 0 in a.shape:
        raise ValueError(f"a must be [S, siblings, R, K] with 1 to {MAX_SIBLINGS} siblings, not {list(a.shape)}")
    slots, siblings, rank, k_size = a.shape
    check_rows("x", x, a)
    check_weights("a", a, (slots, siblings, rank, k_size), a)
    if x.shape != (rows, k_size):
        raise ValueError(f"x must be [{rows}, {k_size}], the rows routed and the K of a, not {list(x.shape)}")
    check_outputs(y, b, ranks, widths, (slots, siblings, rank), rows, a)


def check_outputs(
    y: Tensor, b: Tensor, ranks: LiveRanks, widths: Sequence[int], sizes: tuple[int, int, int], rows: int, like: Tensor
) -> None:
    """The operands that an expand takes; `sizes` are slots, siblings and rank.

    Raises:
        ValueError: one does not fit.
    """
    slots, siblings, rank = sizes
    if len(widths) != siblings or min(widths) < 1:
        raise ValueError(f"widths must be {siblings} positive numbers, one a sibling, not {list(widths)}")
    check_rows("y", y, like)
    if y.shape != (rows, sum(widths)):
        raise ValueError(f"y must be [{rows}, {sum(widths)}], the rows routed and the widths' sum, not {list(y.shape)}")
    check_weights("b", b, (slots, rank, sum(widths)), like)
    if tuple(ranks.tensor.shape) != (slots, siblings) or ranks.tensor.device != like.device:
        raise ValueError(
            f"ranks must be for {slots} slots of {siblings} siblings on {like.device}, "
            f"not {tuple(ranks.tensor.shape)} on {ranks.tensor.device}"
        )
    if ranks.largest > rank:
        raise ValueError(f"ranks must be at most {rank}, the R of a and b, not {ranks.largest}")


def check_mixes(below: int | None, ranks: LiveRanks) -> None:
    """That the mixes of a routing were made for no more slots than there are.

    Raises:
        ValueError: they were made for more.
    """
    if below is not None and below > len(ranks):
        raise ValueError(f"routing must be by mixes of {len(ranks)} slots or fewer, not {below}")
