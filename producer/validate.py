"""The whole input checked before anything is computed, and what remains of it: a few numbers a row."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np

from loramill.producer.prefixes import beginnings
from loramill.schemas.errors import ErrorCode, LineError, invalid
from loramill.schemas.names import Names, Uses
from loramill.schemas.prompt import Prompter
from loramill.schemas.prompters import Prompters
from loramill.schemas.request import Row, parse_line
from loramill.schemas.sampling import resolve_max_tokens

from .index import MAX_SHOWN, Index, Problem
from .reader import Input

# Rows are tokenized together, which is several times faster than one by one; the bytes are bounded too because the
# tokenizer holds some hundred bytes for each token of a batch.
_BATCH_ROWS = 1024
_BATCH_BYTES = 256 * 2**10
_INVALID = -2

OnInvalid = Callable[[int, int, LineError], None]
"""Called with the row number, the line number and what is wrong."""


def validate(
    source: Input,
    prompter: Prompter,
    *,
    names: Names,
    max_mix: int,
    max_rows: int | None = None,
    endpoint: str | None = None,
    on_invalid: OnInvalid | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Index:
    """Check every line of `source` (or its first `max_rows` rows) and index the valid ones.

    prompter: the base's.  names: what rows may name.
    max_mix: the most adapters that one row may mix (--max-loras-per-batch).  endpoint: the only `url` that a line may
    have, if there is one.
    `on_invalid` hears of every invalid line, not quite in order (duplicates come last); `on_progress` of the number of
    rows done, some times a second. Raises InputError when the input as a whole is unusable.
    """
    scan = _Scan(source, Prompters(prompter, names), max_mix, endpoint, on_invalid)
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


def usable(row: Row, prompters: Prompters, max_mix: int) -> Uses:
    """The adapters that answer the row, if they can together, and know the tokens that it names. Raises LineError."""
    names, params = prompters.names, row.params
    uses = names.resolve(row)
    if len(uses) > max_mix and len(names.by_hash(uses)) > max_mix:
        raise invalid(f"a mix of {len(uses)} adapters; --max-loras-per-batch allows {max_mix}", "adapters")
    size = prompters.of(uses).limits.vocab_size
    if params.stop_token_ids and max(params.stop_token_ids) >= size:
        raise invalid(f"`stop_token_ids` holds an id beyond the vocabulary of {size}", "stop_token_ids")
    if params.logit_bias and max(map(int, params.logit_bias)) >= size:
        raise invalid(f"`logit_bias` holds an id beyond the vocabulary of {size}", "logit_bias")
    return uses


class _Scan:
    """The columns while they grow: 52 bytes a row."""

    def __init__(
        self,
        source: Input,
        prompters: Prompters,
        max_mix: int,
        endpoint: str | None,
        on_invalid: OnInvalid | None,
    ) -> None:
        self._source = source
        self._prompters = prompters
        self._route_fields = prompters.names.route_fields
        self._max_mix = max_mix
        self._endpoint = endpoint
        self._mixes: dict[Uses, int] = {(): -1}
        self._on_invalid = on_invalid
        self._line = array("q")
        self._offset = array("q")
        self._length = array("i")
        self._id_hash = array("q")
        self._mix = array("i")
        self._prompt_tokens = array("i")
        self._prompt_hash = array("q")
        self._begins = array("q")
        self._max_tokens = array("i")
        self._n = array("i")
        self._endpoints: set[str] = set()
        self._waiting: list[tuple[int, Row, Uses]] = []
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
        self._prompt_hash.append(0)
        self._begins.append(0)
        self._max_tokens.append(0)
        self._n.append(0)
        try:
            row = parse_line(raw, self._route_fields)
        except LineError as error:
            # An invalid line holds its custom_id all the same; without one its row number cannot meet another's.
            self._id_hash.append(position if error.custom_id is None else hash(error.custom_id))
            self._mix.append(_INVALID)
            self._report(position, error)
            return
        self._id_hash.append(hash(row.custom_id))
        self._mix.append(_INVALID)
        try:
            self._check_endpoint(row)
            uses = usable(row, self._prompters, self._max_mix)
        except LineError as error:
            error.custom_id = row.custom_id
            self._report(position, error)
            return
        self._mix[position] = self._mixes.setdefault(uses, len(self._mixes) - 1)
        self._n[position] = row.params.samples
        self._endpoints.add(row.endpoint.value)
        self._waiting.append((position, row, uses))

    def flush(self) -> None:
        """Tokenize the waiting rows and check their lengths."""
        rows, uses = [row for _, row, _ in self._waiting], [uses for _, _, uses in self._waiting]
        prompts = self._prompters.encode_rows(rows, uses)
        for (position, row, _), prompt in zip(self._waiting, prompts, strict=True):
            try:
                if isinstance(prompt, LineError):
                    raise prompt
                self._prompt_tokens[position] = len(prompt)
                self._prompt_hash[position] = hash(tuple(prompt))  # of integers: the same in every process
                self._begins[position] = beginnings(prompt)
                self._max_tokens[position] = resolve_max_tokens(
                    row.params, len(prompt), self._prompters.base.limits.max_model_len
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
        valid = np.frombuffer(self._mix, np.int32) != _INVALID
        return Index(
            row=np.flatnonzero(valid),
            offset=np.frombuffer(self._offset, np.int64)[valid],
            length=np.frombuffer(self._length, np.int32)[valid],
            mix=np.frombuffer(self._mix, np.int32)[valid],
            prompt_tokens=np.frombuffer(self._prompt_tokens, np.int32)[valid],
            prompt_hash=np.frombuffer(self._prompt_hash, np.int64)[valid],
            begins=np.frombuffer(self._begins, np.int64)[valid],
            max_tokens=np.frombuffer(self._max_tokens, np.int32)[valid],
            n=np.frombuffer(self._n, np.int32)[valid],
            mixes=list(self._mixes)[1:],
            endpoints=frozenset(self._endpoints),
            total_rows=self.rows,
            problem_count=self._problem_count,
            problems=self._first_problems(),
        )

    def _check_endpoint(self, row: Row) -> None:
        if self._endpoint not in (None, row.endpoint):
            message = f"`url` is {row.endpoint}, and the batch's endpoint is {self._endpoint}"
            raise LineError(ErrorCode.URL_MISMATCH, message, "url")

    def _claim(self, firsts: dict[str, int], position: int) -> None:
        """Read the row's custom_id again (equal hashes prove nothing) and report it if it is taken."""
        try:
            line = self._source.read(self._offset[position], self._length[position])
            custom_id = parse_line(line, self._route_fields).custom_id
        except LineError as error:
            if error.custom_id is None:
                return
            custom_id = error.custom_id
        first = firsts.setdefault(custom_id, position)
        if first != position and self._mix[position] != _INVALID:
            message = f"the same custom_id is on line {self._line[first]}"
            self._report(position, LineError(ErrorCode.DUPLICATE_CUSTOM_ID, message, "custom_id", custom_id))

    def _report(self, position: int, error: LineError) -> None:
        self._mix[position] = _INVALID
        self._problem_count += 1
        line = self._line[position]
        self._problems.append(Problem(line, error.code, error.message, error.param, error.custom_id))
        if len(self._problems) > 20 * MAX_SHOWN:  # they do not come in line order: lengths and duplicates are late
            self._problems = self._first_problems()
        if self._on_invalid:
            self._on_invalid(position, line, error)

    def _first_problems(self) -> list[Problem]:
        return sorted(self._problems, key=lambda problem: problem.line)[:MAX_SHOWN]
