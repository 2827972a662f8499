"""Who may ask: keys in a file, of which only hashes are kept."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import threading
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loramill.producer.api.context import Caller, Quota
from loramill.producer.api.webhook_post import Endpoint
from loramill.store.files import atomic_writer

TOKEN_PREFIX = "lm-"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
LOOK_S = 1.0
"""How old what was read of the file may be."""
_HEAD = "# Made by `loramill keys`, which keeps no comments. Keys themselves are not in here, only their hashes.\n"

_log = logging.getLogger("loramill.api")
_QUOTA = Quota()
Count = Annotated[int, Field(ge=0)]


class KeysUnreadable(ValueError):
    """The file is not what `loramill keys` writes; the message is one line that names it."""


class Key(BaseModel):
    """One key, as it stands in the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    operator: bool = False
    adapters: list[str] = ["*"]
    stored_bytes: Count = _QUOTA.stored_bytes
    open_batches: Count = _QUOTA.open_batches
    pending_rows: Count = _QUOTA.pending_rows
    requests_per_minute: Annotated[int, Field(ge=1)] = _QUOTA.requests_per_minute
    questions: Count = _QUOTA.questions
    webhook_url: str | None = None
    webhook_secret: str | None = None

    @model_validator(mode="after")
    def _has_both_or_none(self) -> Key:
        """Raises ValueError unless webhooks could be sent."""
        if (self.webhook_url is None) != (self.webhook_secret is None):
            raise ValueError("webhook_url and webhook_secret go together")
        _ = self.endpoint
        return self

    @property
    def endpoint(self) -> Endpoint | None:
        """Where its events go."""
        if self.webhook_url is None or self.webhook_secret is None:
            return None
        return Endpoint(self.webhook_url, self.webhook_secret)

    def caller(self, name: str) -> Caller:
        """Who asks by it."""
        quota = Quota(self.stored_bytes, self.open_batches, self.pending_rows, self.requests_per_minute, self.questions)
        return Caller(name, self.operator, tuple(self.adapters), quota)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: dict[Annotated[str, Field(pattern=f"^{NAME}$")], Key] = {}


class Keys:
    """Those of a file, read again when it changes; without a file everybody is the one anonymous caller."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises KeysUnreadable. A file that is not there yet lets nobody in until it is."""
        self._path = path
        self._keys: Mapping[str, Key] = {}
        self._seen: tuple[int, ...] | None = None
        self._looked_s = 0.0
        self._lock = threading.Lock()
        if path is not None:
            self._read(path)

    @property
    def open(self) -> bool:
        """Whether any token, or none, is the anonymous caller's."""
        return self._path is None

    def caller(self, token: str | None) -> Caller | None:
        """Whose token it is; None if it is nobody's."""
        if self._path is None:
            return Caller()
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        found = None
        for name, key in self.all().items():
            # Every key is compared, so that the time tells nothing.
            if hmac.compare_digest(key.sha256, digest):
                found = key.caller(name)
        return found if token else None

    def named(self, name: str) -> Key | None:
        """The key of that name."""
        return self.all().get(name)

    def all(self) -> Mapping[str, Key]:
        """By name, as the file is now. A broken file, or one that cannot be read, changes nothing."""
        if self._path is not None:
            with self._lock:
                if time.monotonic() - self._looked_s >= LOOK_S:
                    try:
                        self._read(self._path)
                    except KeysUnreadable as error:
                        _log.error("%s; the keys of before go on", error)
        return self._keys

    def _read(self, path: Path) -> None:
        self._looked_s = time.monotonic()
        try:
            is_now = path.stat()
        except FileNotFoundError:
            if self._seen != ():
                self._keys, self._seen = {}, ()
                _log.warning("%s is not there: nobody is let in; `loramill keys new NAME --keys FILE` makes it", path)
            return
        except OSError as error:
            raise KeysUnreadable(f"{path}: {error.strerror}") from error
        seen = (is_now.st_mtime_ns, is_now.st_size, is_now.st_ino)
        if seen == self._seen:
            return
        self._seen = seen
        if is_now.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            _log.warning("%s can be read by others: chmod 600 %s", path, path)
        self._keys = read_keys(path)


def read_keys(path: Path) -> dict[str, Key]:
    """Every key of the file, by name. Raises KeysUnreadable."""
    try:
        return _File.model_validate(tomllib.loads(path.read_text())).keys
    except OSError as error:
        raise KeysUnreadable(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise KeysUnreadable(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:  # no TOML, no UTF-8
        raise KeysUnreadable(f"{path}: {error}") from error


def write_keys(path: Path, keys: Mapping[str, Key]) -> None:
    """The file with these keys, whole or not at all, for its owner alone to read. Raises StoreError.

    Sets the process's umask for a moment: not for a server."""
    parts = [_HEAD]
    for name, key in keys.items():
        # A JSON string, list, number or boolean is TOML's too.
        values = key.model_dump(exclude_defaults=True)
        lines = (f"{field} = {json.dumps(value, ensure_ascii=False)}" for field, value in values.items())
        parts.append("\n".join([f'[keys."{name}"]', *lines, ""]))
    before = os.umask(0o077)
    try:
        with atomic_writer(path) as write:
            write("\n".join(parts).encode())
    finally:
        os.umask(before)


def new_token() -> str:
    """What a person shows; nowhere is it kept."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def new_webhook_secret() -> str:
    """What signs the calls that a key's owner gets."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def hash_of(token: str) -> str:
    """What is kept of it."""
    return hashlib.sha256(token.encode()).hexdigest()
