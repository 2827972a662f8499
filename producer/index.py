"""What validation leaves of the input: columns of numbers for the valid rows, the problems of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        text = f"{name}:{self.line}: {field}{self.message}"
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclass(slots=True, frozen=True)
class Index:
    """The valid rows in input order, one element of each column a row, and the problems of the others."""

    row: NDArray[np.int64]
    """Row number: position among the non-blank lines, invalid ones included."""
    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    """Where `Input.read` finds the line."""
    adapter: NDArray[np.int32]
    """Position in the `adapters` that were passed; -1 is the base."""
    prompt_tokens: NDArray[np.int32]
    max_tokens: NDArray[np.int32]
    """Resolved: the most tokens that one answer of the row can have."""
    n: NDArray[np.int32]
    """Answers asked for."""
    total_rows: int
    """Non-blank lines, valid or not."""
    problem_count: int
    problems: list[Problem]
    """The first `MAX_SHOWN`, by line."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def cost(self) -> NDArray[np.int64]:
        """Tokens of each row, prompt and answers, for planning."""
        return self.prompt_tokens + self.max_tokens.astype(np.int64) * self.n
