"""How a client reaches its server."""

from __future__ import annotations

import os
from typing import Any

import httpx2

import loramill

BASE_URL = "http://127.0.0.1:8000/v1"
TIMEOUT_S = 60.0
PATIENCE_S = 10.0
ANSWER_S = 600.0


def http_options(base_url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """For httpx2's clients. Raises ValueError for a URL that is none."""
    url = httpx2.URL((base_url or os.environ.get("LORAMILL_API") or BASE_URL).rstrip("/"))
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{url} is no http:// or https:// URL")
    if url.path in ("", "/"):
        url = url.copy_with(path="/v1")
    headers = {"user-agent": f"loramill/{loramill.__version__}"}
    if key := api_key or os.environ.get("LORAMILL_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    return {"base_url": url, "headers": headers, "timeout": timeout_s}
