"""What validation leaves of the input: columns of numbers for the valid rows, the problems of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loramill.schemas.errors import printable
from loramill.schemas.names import Uses

MAX_SHOWN = 100


@dataclass(slots=True, frozen=True)
class Problem:
    """An invalid line."""

    line: int
    code: str
    message: str
    param: str | None
    custom_id: str | None

    def render(self, name: str) -> str:
        """`file:line: field: message`, safe for a terminal: names in it come from the file."""
        field = f"{self.param}: " if self.param else ""
        return printable(f"{name}:{self.line}: {field}{self.message}")


@dataclass(slots=True, frozen=True)
class Index:
    """The valid rows in input order, one element of each column a row, and the problems of the others."""

    row: NDArray[np.int64]
    """Row number: position among the non-blank lines, invalid ones included."""
    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    """Where `Input.read` finds the line."""
    mix: NDArray[np.int32]
    """Position in `mixes`; -1 is the base."""
    prompt_tokens: NDArray[np.int32]
    prompt_hash: NDArray[np.int64]
    """Equal for equal prompts."""
    begins: NDArray[np.int64]
    """How prompts begin, as `prefixes.beginnings`."""
    max_tokens: NDArray[np.int32]
    """Resolved: the most tokens that one answer of the row can have."""
    n: NDArray[np.int32]
    """Answers asked for."""
    mixes: list[Uses]
    """Each once: the adapters that answer a row, with the strength of each."""
    endpoints: frozenset[str]
    """What rows ask for: /v1/chat/completions, /v1/completions."""
    total_rows: int
    """Non-blank lines, valid or not."""
    problem_count: int
    problems: list[Problem]
    """The first `MAX_SHOWN`, by line."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def adapters(self) -> list[str]:
        """The adapters that the valid rows come to, in the order in which they first do."""
        used = [self.mixes[position] for position in np.unique(self.mix) if position >= 0]
        return list(dict.fromkeys(name for uses in used for name, _ in uses))

    @property
    def cost(self) -> NDArray[np.int64]:
        """Tokens of each row, prompt and answers, for planning."""
        return self.prompt_tokens + self.max_tokens.astype(np.int64) * self.n
