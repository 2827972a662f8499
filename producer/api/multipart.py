"""multipart/form-data as it comes in: fields are kept, files are passed on and never held as a whole."""

from __future__ import annotations

from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from loramill.producer.api.errors import ApiError, invalid

MAX_PARTS = 16
MAX_FIELD_BYTES = 4096
FORM_BYTES = 2**17
"""What a form may come to beside its file."""

Take = Callable[[bytes], None]


class Form:
    """Fed with a body in pieces of any size, each by one thread. Whatever is wrong with it is an ApiError."""

    def __init__(self, content_type: str | None, open_file: Callable[[str, str], Take]) -> None:
        """`open_file`, given a part's name and its file name, returns what takes the file's bytes as they come."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise ApiError(415, "send multipart/form-data", code="unsupported_media_type")
        boundary = options.get(b"boundary")
        if not boundary:
            raise _broken("its content type names no boundary")
        self.fields: dict[str, str] = {}
        """By their names, once they are whole."""
        self._open_file = open_file
        self._parts = 0
        self._ended = False
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = bytearray(), bytearray()
        self._field: str | None = None
        self._held = bytearray()
        self._take: Take = self._held.extend
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": lambda data, start, end: self._take(data[start:end]),
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _broken(str(error)) from error

    def feed(self, data: bytes) -> None:
        """The next bytes of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _broken(str(error)) from error

    def close(self) -> None:
        """The body has ended."""
        if not self._ended:
            raise _broken("it ends too early")

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _broken(f"it has more than {MAX_PARTS} parts")
        self._headers.clear()

    def _on_header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        if kind != b"form-data" or b"name" not in options:
            raise _broken("a part has no name")
        name = _text(options[b"name"])
        if b"filename" in options:
            self._take = self._open_file(name, _text(options[b"filename"]))
        elif name in self.fields:
            raise invalid(f"{name} is given twice", param=name)
        else:
            self._field, self._take = name, self._hold

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > MAX_FIELD_BYTES:
            raise invalid(f"{self._field} is longer than {MAX_FIELD_BYTES} bytes", param=self._field)

    def _on_part_end(self) -> None:
        if self._field is not None:
            self.fields[self._field] = _text(bytes(self._held))
        self._field = None
        self._held.clear()

    def _on_end(self) -> None:
        self._ended = True


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _broken("a name or a field is not UTF-8") from None


def _broken(why: str) -> ApiError:
    return invalid(f"the form cannot be read: {why}", code="invalid_multipart")
