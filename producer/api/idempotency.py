"""Creates that may come twice: the id that the first one chose is also the second one's."""

from __future__ import annotations

import hashlib

import orjson

from loramill.producer.api.errors import ApiError
from loramill.store.shelf import RecordExists, RecordNotFound, Shelf

KEY_S = 86400.0
"""How long an Idempotency-Key is known."""
SAME_S = 60.0
"""How long a create without one is taken for the earlier one that it equals: clients send it again by themselves."""
MAX_KEY_CHARS = 255
_KIND = "idempotency"


class Once:
    """One create, by whoever it is and what it says."""

    def __init__(self, shelf: Shelf, owner: str, what: str, body: bytes, key: str | None) -> None:
        """`what` is created with `body`; `key` is the client's Idempotency-Key, if there is one. Raises ApiError."""
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARS:
            message = f"an Idempotency-Key has 1 to {MAX_KEY_CHARS} characters"
            raise ApiError(400, message, code="invalid_idempotency_key")
        self._shelf, self._owner, self._keyed = shelf, owner, key is not None
        self._fingerprint = hashlib.sha256(body).hexdigest()
        said = f"{what}\0{owner}\0" + (f"key\0{key}" if key is not None else f"same\0{self._fingerprint}")
        self._id = hashlib.sha256(said.encode()).hexdigest()

    @property
    def keyed(self) -> bool:
        """Whether the client named it. If not, what is there may be passed over by `forget`."""
        return self._keyed

    def known(self) -> str | None:
        """The id that an earlier one chose. Raises ApiError (409) for a key that came with another body."""
        try:
            said = orjson.loads(self._shelf.get(_KIND, self._id).data)
        except RecordNotFound:
            return None
        if said["fingerprint"] != self._fingerprint:
            message = "this Idempotency-Key came with another body before; give this request another one"
            raise ApiError(409, message, code="idempotency_key_reused", headers={"x-should-retry": "false"})
        id: str = said["id"]
        return id

    def claim(self, id: str) -> str:
        """`id`, or the one that somebody else chose at the same time. Raises ApiError like `known`."""
        data = orjson.dumps({"fingerprint": self._fingerprint, "id": id})
        while True:
            try:
                self._shelf.put(_KIND, self._id, self._owner, data, ttl_s=KEY_S if self._keyed else SAME_S)
                return id
            except RecordExists:
                if earlier := self.known():
                    return earlier
                self.forget()  # its time is up

    def forget(self) -> None:
        """Lets the same be created anew."""
        self._shelf.remove(_KIND, self._id)


def tidy(shelf: Shelf) -> None:
    """Removes what has run out."""
    while some := shelf.overdue(_KIND):
        for record in some:
            shelf.remove(_KIND, record.id)
