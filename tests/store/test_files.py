import gzip
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import zstandard

from loramill.store.errors import StoreError
from loramill.store.files import atomic_writer, remove_file


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


@pytest.mark.parametrize(
    ("name", "unpack"), [("out.jsonl", bytes), ("out.jsonl.gz", gzip.decompress), ("out.jsonl.zst", unzstd)]
)
def test_the_suffix_decides_the_compression(tmp_path: Path, name: str, unpack) -> None:
    with atomic_writer(tmp_path / name) as write:
        write(b"one\n")
        write(b"two\n")
        assert not (tmp_path / name).exists()
    assert unpack((tmp_path / name).read_bytes()) == b"one\ntwo\n"
    assert names(tmp_path) == [name]


def test_the_same_lines_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        with atomic_writer(tmp_path / name) as write:
            write(b"same")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_writer(tmp_path / name) as write:
        write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / name).read_bytes() == b"old"
    assert names(tmp_path) == [name]


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.part").write_bytes(b"torn and long")
    with atomic_writer(tmp_path / "out.jsonl") as write:
        write(b"new")
    assert (tmp_path / "out.jsonl").read_bytes() == b"new"


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    target = tmp_path / "no" / "out.jsonl"
    with pytest.raises(StoreError, match=r"cannot write .*out\.jsonl: No such file"), atomic_writer(target):
        pass


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, name: str) -> None:
    code = f"""
        import os, resource
        from pathlib import Path
        from loramill.store.errors import StoreError
        from loramill.store.files import atomic_writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with atomic_writer(Path({str(tmp_path / name)!r})) as write:
                for _ in range(100): write(os.urandom(4096))
        except StoreError as error:
            print(error)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"cannot write {tmp_path / name}: File too large")
    assert not names(tmp_path)


def test_remove_file_minds_no_absence(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    remove_file(tmp_path / "x")
    remove_file(tmp_path / "x")
    assert not names(tmp_path)
