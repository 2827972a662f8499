"""Which tokenizer writes and reads a row: the base's, or that of the adapter that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import LineError
from .names import Names, Uses
from .prompt import Prompter
from .request import Row


@dataclass(slots=True, frozen=True)
class Prompters:
    """The base's prompter, and those that names stand for."""

    base: Prompter
    names: Names

    def of(self, uses: Uses) -> Prompter:
        """The one for rows that are answered by `uses`."""
        return self.names.prompter(uses) or self.base

    def encode_rows(self, rows: Sequence[Row], uses: Sequence[Uses]) -> list[list[int] | LineError]:
        """The prompt of each row as token ids, or what is wrong with it; `uses` is what each of them comes to."""
        positions: dict[Prompter, list[int]] = {}
        for position, one in enumerate(uses):
            positions.setdefault(self.of(one), []).append(position)
        out: list[list[int] | LineError] = [[] for _ in rows]
        for prompter, some in positions.items():
            encoded = prompter.encode_rows([rows[at] for at in some], [self.names.template(uses[at]) for at in some])
            for at, prompt in zip(some, encoded, strict=True):
                out[at] = prompt
        return out
