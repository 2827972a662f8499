"""One signed POST (https://www.standardwebhooks.com) to an address that may be connected to, and to no other."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import httpx2

TIMEOUT_S = 10.0
_PREFIX = "whsec_"
_LEAST_SECRET = 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Refused(Exception):
    """It could not be sent; the message names neither the URL nor the secret."""


@dataclass(slots=True, frozen=True)
class Endpoint:
    """Where an owner's events go. Raises ValueError for what cannot be one."""

    url: str = field(repr=False)
    secret: str = field(repr=False)
    """`whsec_` and base64, as the receiver has it."""

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"a webhook's URL cannot be read: {error}") from None
        if url.scheme not in ("https", "http") or not url.host or url.userinfo:
            raise ValueError("a webhook's URL is https://host[:port]/path, without a user's name")
        if len(self.key) < _LEAST_SECRET:
            raise ValueError(f"a webhook's secret has at least {_LEAST_SECRET} bytes")

    @property
    def key(self) -> bytes:
        """What signs. Raises ValueError."""
        try:
            if not self.secret.startswith(_PREFIX):
                raise ValueError
            return base64.b64decode(self.secret.removeprefix(_PREFIX), validate=True)
        except (ValueError, binascii.Error):
            raise ValueError(f"a webhook's secret is {_PREFIX} and base64") from None


def signature(key: bytes, event_id: str, at_s: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    digest = hmac.new(key, f"{event_id}.{at_s}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def post(endpoint: Endpoint, event_id: str, body: bytes, *, allow_private: bool) -> int:
    """The status that the receiver answers with; redirects are not followed. Raises Refused."""
    url = httpx2.URL(endpoint.url)
    if url.scheme != "https" and not allow_private:
        raise Refused("webhooks go to https alone")
    address = _address(url.host, url.port or (443 if url.scheme == "https" else 80), allow_private=allow_private)
    now_s = int(time.time())
    headers = {
        "host": url.netloc.decode(),
        "content-type": "application/json",
        "user-agent": "loramill",
        "webhook-id": event_id,
        "webhook-timestamp": str(now_s),
        "webhook-signature": signature(endpoint.key, event_id, now_s, body),
    }
    # To the very address that was looked at: asked again, the name could lead elsewhere. No proxy either.
    there, named = url.copy_with(host=str(address)), {"sni_hostname": url.host}
    try:
        with (
            httpx2.Client(trust_env=False, follow_redirects=False, timeout=TIMEOUT_S) as client,
            client.stream("POST", there, content=body, headers=headers, extensions=named) as answer,
        ):
            return answer.status_code
    except (httpx2.HTTPError, OSError) as error:
        raise Refused(f"the receiver could not be reached: {type(error).__name__}") from None


def _address(host: str, port: int, *, allow_private: bool) -> Address:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Refused("the receiver's name is not known") from None
    return choose((str(one[4][0]) for one in found), allow_private=allow_private)


def choose(addresses: Iterable[str], *, allow_private: bool) -> Address:
    """The first of a name's addresses. Raises Refused if any is of a private network, unless that is allowed."""
    parsed = [ipaddress.ip_address(text.partition("%")[0]) for text in addresses]
    if not parsed:
        raise Refused("the receiver's name has no address")
    if not allow_private and not all(map(is_public, parsed)):
        raise Refused("the receiver is in a private network")
    return parsed[0]


def is_public(address: Address) -> bool:
    """Whether it is one of the Internet, and no other way of writing one that is not."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.sixtofour or address.teredo:
            return False
        if address.ipv4_mapped or address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address.is_global and not address.is_multicast and not address.is_reserved
