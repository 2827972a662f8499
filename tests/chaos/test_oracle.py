"""The oracle finds every kind of wrong outcome, and nothing in a right one."""

from collections.abc import Callable

import orjson
import pytest

from loramill.schemas.request import parse_line
from loramill.schemas.response import Answer, Choice, Served, error_line, ok_line
from loramill.store.packing import Chunk
from loramill.store.records import DoneRow
from tests.chaos.oracle import Expected, Wrong, check_chunks, check_files, digest

BASE = "stub"
HASHES = {None: None, "a00": "00" * 32, "a01": "01" * 32}
ROWS = [
    Expected(f"r{number}", (None, "a00", "a01")[number % 3], f"ok:r{number}")
    if number != 4
    else Expected("r4", "a00", "", 500, "engine_crash")
    for number in range(9)
]  # fmt: skip


def _line(row: Expected, created: int = 1) -> bytes:
    if row.code is not None:
        return error_line("job", 0, row.custom_id, "it died", code=row.code, status=row.status)
    asked = {"id": row.custom_id, "prompt": "x"} | ({"adapter": row.adapter} if row.adapter else {})
    served = [Served(row.adapter, HASHES[row.adapter] or "")] if row.adapter else []
    answer = Answer([Choice(0, row.content, "stop", [1])], 1, row.adapter or BASE, served)
    return ok_line("job", 0, parse_line(orjson.dumps(asked)), answer, created)


def _files(rows: list[Expected]) -> tuple[list[bytes], list[bytes]]:
    return [_line(row) for row in rows if row.code is None], [_line(row) for row in rows if row.code is not None]


def test_a_right_outcome_is_right() -> None:
    assert check_files(ROWS, *_files(ROWS), HASHES, BASE) == digest(ROWS)
    later = [_line(row, created=99) for row in ROWS if row.code is None]
    assert check_files(ROWS, later, _files(ROWS)[1], HASHES, BASE) == digest(ROWS)


def _swap(output: list[bytes], errors: list[bytes]) -> None:
    output[0], output[1] = output[1], output[0]


def _answer_by_the_base(output: list[bytes], errors: list[bytes]) -> None:
    said = orjson.loads(output[1])
    said["response"]["body"]["loramill"] |= {"adapter": None, "adapter_sha256": None, "mode": "base"}
    output[1] = orjson.dumps(said)


def _hash_of_another(output: list[bytes], errors: list[bytes]) -> None:
    output[1] = output[1].replace(b"00" * 32, b"01" * 32)


def _fail_a_sibling(output: list[bytes], errors: list[bytes]) -> None:
    errors.insert(0, error_line("job", 0, "r1", "it died", code="engine_crash", status=500))
    del output[1]


def _answer_the_poison(output: list[bytes], errors: list[bytes]) -> None:
    output.insert(4, _line(Expected("r4", "a00", "ok:r4")))
    errors.clear()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda output, errors: output.pop(3), "r3 is missing"),
        (lambda output, errors: errors.clear(), "r4 is missing"),
        (lambda output, errors: output.insert(3, output[3]), "r3 is there 2 times"),
        (lambda output, errors: errors.append(errors[0]), "r4 is there 2 times"),
        (lambda output, errors: errors.append(error_line("job", 0, "r3", "x", code="c")), "r3 is there 2 times"),
        (lambda output, errors: output.append(_line(Expected("r9", None, "ok:r9"))), "r9 is unknown"),
        (lambda output, errors: output.__setitem__(3, output[3].replace(b"ok:r3", b"ok:r2")), "r3 says 'ok:r2'"),
        (_swap, "not in input order"),
        (_answer_by_the_base, "r1 names a00 and was answered by stub"),
        (_hash_of_another, "r1 names a00 and was answered by"),
        (_fail_a_sibling, "r1 failed with engine_crash"),
        (_answer_the_poison, "r4 was answered"),
        (lambda output, errors: errors.__setitem__(0, errors[0].replace(b"crash", b"cash_")), "not 500 engine_crash"),
    ],
)
def test_a_wrong_outcome_is_found(spoil: Callable[[list[bytes], list[bytes]], object], said: str) -> None:
    output, errors = _files(ROWS)
    spoil(output, errors)
    with pytest.raises(Wrong, match=said):
        check_files(ROWS, output, errors, HASHES, BASE)


def _chunk(*numbers: int, created: int = 1, content: str = "") -> Chunk:
    rows = [
        DoneRow(number, ROWS[number].code is not None,
                _line(ROWS[number] if not content else Expected(f"r{number}", None, content), created))
        for number in numbers
    ]  # fmt: skip
    return Chunk.of(rows, range(len(rows)))


def test_a_row_committed_twice_is_counted_and_must_be_the_same() -> None:
    whole = _chunk(*range(9))
    assert check_chunks([whole], 9) == 0
    assert check_chunks([whole, _chunk(1, 4, created=2)], 9) == 2
    with pytest.raises(Wrong, match="row 1 was committed as"):
        check_chunks([whole, _chunk(1, content="else")], 9)


def test_rows_without_a_result_and_results_without_a_row_are_found() -> None:
    with pytest.raises(Wrong, match="1 of 9 rows have no result"):
        check_chunks([_chunk(*range(8))], 9)
    with pytest.raises(Wrong, match="nobody submitted"):
        check_chunks([_chunk(*range(9))], 8)
