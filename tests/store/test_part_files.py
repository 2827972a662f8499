"""Files on real file systems: a folder of this machine, and fsspec's own memory."""

import resource
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from loramill.store.errors import StoreError, StoreRefused
from loramill.store.part_files import Files
from tests.store.unprivileged import folder_that_cannot_be_written


@pytest.fixture(params=["bare", "file", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """An empty folder."""
    urls = {
        "bare": f"{tmp_path}/out/parts/",
        "file": f"file://{tmp_path}/parts",
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return Files(urls[request.param])


def test_what_is_put_can_be_got_and_replaced(files: Files) -> None:
    files.put("job/a.zst", b"\x00one")
    files.put("top", b"")
    assert (files.get("job/a.zst"), files.get("top")) == (b"\x00one", b"")
    files.put("job/a.zst", b"two")
    assert files.get("job/a.zst") == b"two"


def test_another_handle_sees_the_same(files: Files) -> None:
    files.put("job/a", b"1")
    assert Files(files.url).get("job/a") == b"1"


def test_what_is_not_there_is_an_error_that_names_it(files: Files) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*/job/a: "):
        files.get("job/a")


def test_removing_a_folder_removes_nothing_else(files: Files) -> None:
    for name in ("job/a", "job/b", "job-2/a"):
        files.put(name, b"1")
    files.remove("job")
    files.remove("job")
    files.remove("never")
    assert files.get("job-2/a") == b"1"
    for name in ("job/a", "job/b"):
        with pytest.raises(StoreError):
            files.get(name)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/x", "", ".", "a//b", "a/", "..\\a", "a\0b"])
def test_names_stay_inside_the_folder(files: Files, name: str) -> None:
    for use in (lambda: files.put(name, b""), lambda: files.get(name), lambda: files.remove(name)):
        with pytest.raises(StoreError, match="is no name in the folder"):
            use()


def test_nothing_is_left_of_the_probe_and_of_what_was_written(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "parts"))
    assert list((tmp_path / "parts").iterdir()) == []
    files.put("job/a", b"1")
    assert [path.name for path in (tmp_path / "parts" / "job").iterdir()] == ["a"]


def test_memory_is_shared_by_the_threads_of_a_process() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    names = [f"job-{at % 3}/{at}" for at in range(60)]
    writers = [threading.Thread(target=lambda name=name: Files(url).put(name, name.encode())) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [Files(url).get(name) for name in names] == [name.encode() for name in names]


def test_a_folder_that_cannot_be_written_is_refused_when_it_is_opened() -> None:
    with (
        folder_that_cannot_be_written() as folder,
        pytest.raises(StoreRefused, match="for part files: Permission denied"),
    ):
        Files(str(folder / "parts"))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("not a folder")
    with pytest.raises(StoreRefused, match="cannot use the folder"):
        Files(str(tmp_path / "parts"))


@pytest.mark.parametrize(("url", "named"), [("s3://bucket/parts", "s3fs"), ("abfs://c/parts", "adlfs")])
def test_a_protocol_without_its_package_names_it(url: str, named: str) -> None:
    with pytest.raises(StoreRefused, match=named):
        Files(url)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(StoreRefused, match="nosuch"):
        Files("nosuch://parts")


def limited(bytes_: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    return limit


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    code = f"""
        from loramill.store.errors import StoreFull
        from loramill.store.part_files import Files
        files = Files({str(tmp_path / "parts")!r})
        files.put("job/small", b"x" * 1000)
        try:
            files.put("job/large", b"x" * 100_000)
        except StoreFull as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, preexec_fn=limited(50_000)
    )
    assert done.stdout.startswith(f"cannot write {tmp_path}/parts/job/large: File too large"), done.stderr
    assert [path.name for path in (tmp_path / "parts/job").iterdir()] == ["small"]


def test_a_full_disk_is_said_when_it_is_opened(tmp_path: Path) -> None:
    code = f"""
        from loramill.store.errors import StoreFull
        from loramill.store.part_files import Files
        try:
            Files({str(tmp_path / "parts")!r})
        except StoreFull as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, preexec_fn=limited(0)
    )
    assert "File too large" in done.stdout, done.stderr
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_kill_between_writing_and_renaming_shows_nothing(tmp_path: Path) -> None:
    code = f"""
        import os, pathlib, signal
        from loramill.store.part_files import Files
        files = Files({str(tmp_path / "parts")!r})
        files.put("job/a", b"old")
        pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        files.put("job/a", b"new")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = Files(str(tmp_path / "parts"))
    assert files.get("job/a") == b"old"
    files.remove("job")
    assert not (tmp_path / "parts/job").exists(), "with what the killed one left"
