"""What crosses a process boundary: job lines, prompts, results (pydantic and orjson; no torch)."""
