"""Folders that this process cannot write, root or not."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """Rights are checked as for a user without any; nothing changes for who is no root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that everybody can enter; root's own temporary folders are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        folder.chmod(0o777)
        shutil.rmtree(folder)


@contextmanager
def folder_that_cannot_be_written() -> Iterator[Path]:
    """It can be read."""
    with open_folder() as folder:
        folder.chmod(0o555)
        with as_nobody():
            yield folder
