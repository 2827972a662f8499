"""Parts of uploads: files of a kind of their own, until one file is made of them."""

from __future__ import annotations

from loramill.producer.api.contents import PART_KIND, Contents, Writing
from loramill.producer.api.writing import stored
from loramill.store.shelf import Record, RecordNotFound, Shelf

PART_S = 2 * 3600.0
"""How long a part is kept: an hour longer than the upload, so that none goes while a file is made of it."""


def file_id_of(upload_id: str) -> str:
    """Of the file that an upload becomes. Known before, so that who completes it again makes no second one."""
    return "file-" + upload_id.removeprefix("upload_")


class Parts(Contents):
    """A part's purpose is its upload, its file name the file that is to be made of it."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf, PART_KIND, "part_")
        self._files = Contents(shelf)

    def add(self, owner: str, upload_id: str, max_bytes: int) -> Writing:
        """A new part of an upload."""
        return self.begin(owner, file_id_of(upload_id), upload_id, ttl_s=PART_S, max_bytes=max_bytes)

    def drop(self, owner: str, upload_id: str) -> None:
        """Forgets all parts of an upload; what they consist of stays if it is the file's by now."""
        for part in self.list(owner, purpose=upload_id)[0]:
            self.remove(owner, part.id)

    def _clear(self, record: Record) -> None:
        if self._is_of_a_file(record):
            self._shelf.remove(record.kind, record.id)
        else:
            super()._clear(record)

    def _is_of_a_file(self, record: Record) -> bool:
        part = stored(record)
        if part is None:
            return False
        try:
            file = self._files.find(part.owner, part.filename)
        except RecordNotFound:
            return False
        return part.contents[0] in file.contents
