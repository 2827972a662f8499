"""The whole input checked before anything is computed, and what remains of it: a few numbers a row."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from loramill.schemas.errors import ErrorCode, LineError, invalid
from loramill.schemas.prompt import Prompter
from loramill.schemas.request import Row, parse_line, resolve_model
from loramill.schemas.sampling import Params, resolve_max_tokens

from .index import MAX_SHOWN, Index, Problem
from .reader import Input

# Rows are tokenized together, which is several times faster than one by one; the bytes are bounded too because the
# tokenizer holds some hundred bytes for each token of a batch.
_BATCH_ROWS = 1024
_BATCH_BYTES = 256 * 2**10
_MAX_NAMES = 100_000
_INVALID = -2

OnInvalid = Callable[[int, int, LineError], None]
"""Called with the row number, the line number and what is wrong."""


def validate(
    source: Input,
    prompter: Prompter,
    *,
    base_name: str,
    adapters: Sequence[str],
    max_rows: int | None = None,
    on_invalid: OnInvalid | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Index:
    """Check every line of `source` (or its first `max_rows` rows) and index the valid ones.

    `on_invalid` hears of every invalid line, not quite in order (duplicates come last); `on_progress` of the number of
    rows done, some times a second. Raises InputError when the input as a whole is unusable.
    """
    scan = _Scan(source, prompter, base_name, adapters, on_invalid)
    batch_bytes = 0
    for number, offset, raw in source.lines():
        if max_rows is not None and scan.rows == max_rows:
            break
        scan.add(number, offset, raw)
        batch_bytes += len(raw)
        if scan.pending == _BATCH_ROWS or batch_bytes >= _BATCH_BYTES:
            scan.flush()
            batch_bytes = 0
            if on_progress:
                on_progress(scan.rows)
    scan.flush()
    scan.refuse_duplicates()
    if on_progress:
        on_progress(scan.rows)
    return scan.index()


class _Scan:
    """The columns while they grow: 44 bytes a row."""

    def __init__(
        self,
        source: Input,
        prompter: Prompter,
        base_name: str,
        adapters: Sequence[str],
        on_invalid: OnInvalid | None,
    ) -> None:
        self._source = source
        self._prompter = prompter
        self._base_name = base_name
        self._names = list(adapters)
        self._numbers = {name: position for position, name in enumerate(adapters)}
        self._resolved: dict[str, int | LineError] = {}
        self._on_invalid = on_invalid
        self._line = array("q")
        self._offset = array("q")
        self._length = array("i")
        self._id_hash = array("q")
        self._adapter = array("i")
        self._prompt_tokens = array("i")
        self._max_tokens = array("i")
        self._n = array("i")
        self._waiting: list[tuple[int, Row, str | None]] = []
        self._problems: list[Problem] = []
        self._problem_count = 0

    @property
    def rows(self) -> int:
        """Non-blank lines seen."""
        return len(self._line)

    @property
    def pending(self) -> int:
        """Rows that wait to be tokenized."""
        return len(self._waiting)

    def add(self, number: int, offset: int, raw: bytes) -> None:
        """Parse one line; its prompt is counted at the next flush."""
        position = len(self._line)
        self._line.append(number)
        self._offset.append(offset)
        self._length.append(len(raw))
        self._prompt_tokens.append(0)
        self._max_tokens.append(0)
        self._n.append(0)
        try:
            row = parse_line(raw)
        except LineError as error:
            # An invalid line holds its custom_id all the same; without one its row number cannot meet another's.
            self._id_hash.append(position if error.custom_id is None else hash(error.custom_id))
            self._adapter.append(_INVALID)
            self._report(position, error)
            return
        self._id_hash.append(hash(row.custom_id))
        self._adapter.append(_INVALID)
        try:
            adapter = self._resolve(row.model)
            self._check_vocabulary(row.params)
        except LineError as error:
            error.custom_id = row.custom_id
            self._report(position, error)
            return
        self._adapter[position] = adapter
        self._n[position] = row.params.samples
        self._waiting.append((position, row, self._names[adapter] if adapter >= 0 else None))

    def flush(self) -> None:
        """Tokenize the waiting rows and check their lengths."""
        rows = [row for _, row, _ in self._waiting]
        prompts = self._prompter.encode_rows(rows, [adapter for _, _, adapter in self._waiting])
        for (position, row, _), prompt in zip(self._waiting, prompts, strict=True):
            try:
                if isinstance(prompt, LineError):
                    raise prompt
                self._prompt_tokens[position] = len(prompt)
                self._max_tokens[position] = resolve_max_tokens(
                    row.params, len(prompt), self._prompter.limits.max_model_len
                )
            except LineError as error:
                error.custom_id = row.custom_id
                self._report(position, error)
        self._waiting.clear()

    def refuse_duplicates(self) -> None:
        """Report every line whose custom_id an earlier line has."""
        hashes = np.frombuffer(self._id_hash, np.int64)
        order = np.argsort(hashes, kind="stable")
        same = hashes[order[1:]] == hashes[order[:-1]]
        if not same.any():
            return
        firsts: dict[str, int] = {}
        last = None
        for at in np.flatnonzero(same):
            if last != at - 1:  # a new run of equal hashes; only its members can be each other's duplicates
                firsts = {}
                self._claim(firsts, int(order[at]))
            last = at
            self._claim(firsts, int(order[at + 1]))

    def index(self) -> Index:
        """The finished columns, invalid rows left out."""
        valid = np.frombuffer(self._adapter, np.int32) != _INVALID
        return Index(
            row=np.flatnonzero(valid),
            offset=np.frombuffer(self._offset, np.int64)[valid],
            length=np.frombuffer(self._length, np.int32)[valid],
            adapter=np.frombuffer(self._adapter, np.int32)[valid],
            prompt_tokens=np.frombuffer(self._prompt_tokens, np.int32)[valid],
            max_tokens=np.frombuffer(self._max_tokens, np.int32)[valid],
            n=np.frombuffer(self._n, np.int32)[valid],
            total_rows=self.rows,
            problem_count=self._problem_count,
            problems=self._first_problems(),
        )

    def _resolve(self, model: str) -> int:
        found = self._resolved.get(model)
        if found is None:
            try:
                name = resolve_model(model, self._base_name, self._numbers)
                found = -1 if name is None else self._numbers[name]
            except LineError as error:  # kept too: looking for the nearest of a thousand names takes milliseconds
                found = error
            if len(self._resolved) < _MAX_NAMES:
                self._resolved[model] = found
        if isinstance(found, LineError):
            raise LineError(found.code, found.message, found.param)
        return found

    def _check_vocabulary(self, params: Params) -> None:
        size = self._prompter.limits.vocab_size
        if params.stop_token_ids and max(params.stop_token_ids) >= size:
            raise invalid(f"`stop_token_ids` holds an id beyond the vocabulary of {size}", "stop_token_ids")
        if params.logit_bias and max(map(int, params.logit_bias)) >= size:
            raise invalid(f"`logit_bias` holds an id beyond the vocabulary of {size}", "logit_bias")

    def _claim(self, firsts: dict[str, int], position: int) -> None:
        """Read the row's custom_id again (equal hashes prove nothing) and report it if it is taken."""
        try:
            custom_id = parse_line(self._source.read(self._offset[position], self._length[position])).custom_id
        except LineError as error:
            if error.custom_id is None:
                return
            custom_id = error.custom_id
        first = firsts.setdefault(custom_id, position)
        if first != position and self._adapter[position] != _INVALID:
            message = f"the same custom_id is on line {self._line[first]}"
            self._report(position, LineError(ErrorCode.DUPLICATE_CUSTOM_ID, message, "custom_id", custom_id))

    def _report(self, position: int, error: LineError) -> None:
        self._adapter[position] = _INVALID
        self._problem_count += 1
        line = self._line[position]
        self._problems.append(Problem(line, error.code, error.message, error.param, error.custom_id))
        if len(self._problems) > 20 * MAX_SHOWN:  # they do not come in line order: lengths and duplicates are late
            self._problems = self._first_problems()
        if self._on_invalid:
            self._on_invalid(position, line, error)

    def _first_problems(self) -> list[Problem]:
        return sorted(self._problems, key=lambda problem: problem.line)[:MAX_SHOWN]
