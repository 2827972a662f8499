"""What the OpenAPI document says of an answer in server-sent events."""

from __future__ import annotations

from typing import Any

# `itemSchema` is of OpenAPI 3.2, and what FastAPI writes of its own streams; `schema` alone would be of every event.
EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "required": ["data"],
            "properties": {
                "event": {"type": "string"},
                "data": {"type": "string", "description": "JSON, but for the last event of an answer: `[DONE]`."},
                "id": {"type": "string"},
            },
        }
    }
}
