"""Channels in files: what is torn is not heard, what is old goes, and what cannot be written is said."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from loramill.store import said_files
from loramill.store.errors import StoreRefused
from loramill.store.said_files import SaidFiles


@pytest.fixture
def said(tmp_path: Path) -> SaidFiles:
    return SaidFiles(tmp_path / "said", 600.0)


def file_of(said: SaidFiles) -> Path:
    [path] = said._folder.iterdir()
    return path


def test_what_a_killed_speaker_left_torn_is_not_heard(said: SaidFiles) -> None:
    said.say("c", b"whole")
    path = file_of(said)
    line = path.read_bytes()
    for torn_at in range(1, len(line)):
        with path.open("wb") as file:
            file.write(line + line[:torn_at])
        fresh = SaidFiles(said._folder, 600.0)
        # All of a line but its newline is all of it: it is heard once that is there.
        assert fresh.heard("c", 0) == [b"whole"]
        fresh.say("c", b"next")
        whole = [b"whole"] if torn_at == len(line) - 1 else []
        assert fresh.heard("c", 0) == [b"whole", *whole, b"next"]
        assert fresh.heard("c", 1) == [*whole, b"next"]


def test_a_listener_goes_on_where_it_was(said: SaidFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(said_files, "PLACES", 3)
    for channel in "abcdef":
        for number in range(5):
            said.say(channel, b"%d" % number)
            assert said.heard(channel, number) == [b"%d" % number]
    assert len(said._places) <= 3
    for channel in "abcdef":
        assert said.heard(channel, 3) == [b"3", b"4"]


def test_what_was_said_long_ago_is_removed(said: SaidFiles) -> None:
    said.say("old", b"x")
    path = file_of(said)
    os.utime(path, (time.time() - 601, time.time() - 601))
    said.say("new", b"x")
    assert said.heard("old", 0) == [b"x"], "it is not looked for at every question"
    another = SaidFiles(said._folder, 600.0)
    another.say("newer", b"x")
    assert another.heard("old", 0) == []
    assert another.heard("new", 0) == another.heard("newer", 0) == [b"x"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(b"")
    said = SaidFiles(tmp_path / "said", 600.0)
    with pytest.raises(StoreRefused, match="cannot use"):
        said.say("c", b"x")


def test_a_full_disk_is_said_and_half_a_line_is_not_heard(tmp_path: Path) -> None:
    code = f"""
        import resource
        from pathlib import Path
        from loramill.store.errors import StoreFull
        from loramill.store.said_files import SaidFiles
        said = SaidFiles(Path({str(tmp_path)!r}) / "said", 600.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for number in range(100):
            try:
                said.say("c", b"x" * 40)
            except StoreFull:
                print(number, len(said.heard("c", 0)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    refused = [line.split() for line in done.stdout.splitlines()]
    assert len(refused) > 50, done.stderr
    assert all(heard == refused[0][0] for _, heard in refused)
