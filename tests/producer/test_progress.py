import io

import pytest

from loramill.producer.progress import Moment, Progress, counter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def moment(rows: int, failed: int = 0) -> Moment:
    return Moment(rows, failed, prompt_tokens=rows * 100, completion_tokens=rows * 10, adapters_resident=3)


def test_elsewhere_than_on_a_terminal_one_plain_line_every_five_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, stream=stream, clock=clock) as progress:
        for second in range(11):
            clock.now = 100.0 + second
            progress.update(moment(second * 10, failed=second // 10))
    first, second = stream.getvalue().splitlines()
    assert first == "50/1,000 rows  ETA 01:35  in 1,000 out 100 tok/s  0 failed  3 adapters resident"
    assert second == "100/1,000 rows  ETA 01:30  in 1,000 out 100 tok/s  1 failed  3 adapters resident"


def test_rates_are_of_the_last_seconds_not_of_the_whole_run() -> None:
    stream, clock = io.StringIO(), Clock()
    rows = 0
    with Progress(10**6, stream=stream, clock=clock) as progress:
        for second in range(100):
            rows += 1000 if second < 50 else 1
            clock.now = 100.0 + second
            progress.update(moment(rows))
    assert "in 100 out 10 tok/s" in stream.getvalue().splitlines()[-1]


def test_no_rate_and_no_eta_before_a_row_is_done() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(10, stream=stream, clock=clock) as progress:
        progress.update(moment(0))
        clock.now += 6
        progress.update(moment(0))
    assert "ETA --:--" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_says_nothing(stream: io.StringIO) -> None:
    clock = Clock()
    with Progress(10, quiet=True, stream=stream, clock=clock) as progress:
        for _ in range(5):
            clock.now += 10
            progress.update(moment(1))
    assert not stream.getvalue()


def test_a_terminal_has_a_live_line_with_all_the_counts() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(1000, stream=stream, clock=clock) as progress:
        for second in range(3):
            clock.now = 100.0 + second
            progress.update(moment(second * 10, failed=second))
    shown = stream.getvalue()
    for part in ("20/1,000 rows", "in 1,000 out 100 tok/s", "3 adapters resident", "2 failed", "ETA 01:38"):
        assert part in shown


def test_the_counter_speaks_every_few_seconds(capsys) -> None:
    clock = Clock()
    count = counter("checked {} lines of in.jsonl", clock=clock)
    for second in range(12):
        clock.now = 100.0 + second
        count(second * 1000)
    said = capsys.readouterr()
    assert said.err == "checked 5,000 lines of in.jsonl\nchecked 10,000 lines of in.jsonl\n"
    assert not said.out
