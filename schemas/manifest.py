"""What a worker serves, as data: enough to check a job's lines and count their tokens without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

from pydantic import BaseModel, ConfigDict

FORMAT = 1


class AdapterOffer(BaseModel):
    """An adapter that a worker serves, under one of its names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    key: str
    """What decides its answers, as one hash: its content, with the chat template and tokenizer that it brings."""
    sha256: str
    """Of its content alone: what result lines carry."""
    rank: int
    targets: tuple[str, ...]
    scale: float = 1.0
    alone: str | None = None
    """Why it can only be used by itself and at strength 1, if that is so: it is served merged."""
    template: str | None = None
    """The chat template that it brings."""
    tokenizer: str | None = None
    """Where its training added tokens: which of the manifest's `tokenizers` is its own."""
    vocab_size: int | None = None


class Manifest(BaseModel):
    """A base with its adapters, and what rows may ask of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    format: int = FORMAT
    base: str
    """What job lines call the base."""
    parts: Mapping[str, str]
    """What of the base decides the answers, as a person calls it -> its content's hash, or its value."""
    max_model_len: int
    vocab_size: int
    max_loras: int
    """--max-loras-per-batch: the most adapters of one row, and of one shard."""
    sampling_defaults: Mapping[str, float]
    tokenizer: str
    """The base's, one of `tokenizers`."""
    chat_template: str | None = None
    """The operator's, in place of the base's own."""
    tokenizers: Mapping[str, Mapping[str, str]]
    """Each tokenizer's files: name -> the blob that holds it."""
    adapters: tuple[AdapterOffer, ...] = ()
    aliases: Mapping[str, Mapping[str, float]] = {}
    routes: Mapping[str, Mapping[str, str]] = {}

    @cached_property
    def base_id(self) -> str:
        """Workers with the same one give the same answers to rows of the base."""
        return _digest(repr(sorted(self.parts.items())))

    @cached_property
    def id(self) -> str:
        """Names this very manifest."""
        return _digest(self.model_dump_json())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
