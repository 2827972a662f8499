"""What opened models can serve, as the manifest that a worker publishes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from loramill.schemas.manifest import AdapterOffer, Manifest
from loramill.schemas.names import Named
from loramill.worker.base_files import tokenizer_files, tokenizer_sha256
from loramill.worker.models import Models
from loramill.worker.settings import ModelOptions

_CONFIG = "config.json"
"""The base's: its model type decides how tokenizer files are read, an adapter's too."""


def manifest_of(models: Models, options: ModelOptions, dtype: str) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest, and the files that it speaks of by their sha256; `dtype` is what is computed in."""
    folder = Path(models.base.path)
    blobs: dict[str, bytes] = {}
    base_tokenizer = tokenizer_sha256(folder)
    tokenizers = {base_tokenizer: _files(folder, folder, blobs)}
    offers = []
    for name, adapter in models.adapters.items():
        named = models.names.adapters[name]
        own = tokenizer_sha256(Path(adapter.path)) if named.prompter else None
        if own is not None and own not in tokenizers:
            tokenizers[own] = _files(Path(adapter.path), folder, blobs)
        offers.append(
            AdapterOffer(
                name=name,
                key=adapter_key(named, own),
                sha256=named.sha256,
                rank=adapter.rank,
                targets=tuple(sorted({module.rpartition(".")[2] for module in adapter.targets})),
                scale=named.scale,
                alone=named.alone,
                template=named.template,
                tokenizer=own,
                vocab_size=adapter.vocab_size or None,
            )
        )
    parts = {what: value for what, value in models.parts.items() if what != "--seed"}  # a job brings its own
    manifest = Manifest(
        base=models.names.base,
        parts=parts | {"--dtype": dtype},
        max_model_len=models.base.max_model_len,
        vocab_size=models.base.vocab_size,
        max_loras=models.slots,
        sampling_defaults=models.base.sampling_defaults,
        tokenizer=base_tokenizer,
        chat_template=models.opener.tokenizers.chat_template,
        tokenizers=tokenizers,
        adapters=tuple(offers),
        aliases=models.names.aliases,
        routes=models.names.routes,
    )
    return manifest, blobs


def adapter_key(named: Named, tokenizer: str | None) -> str:
    """What decides an adapter's answers at a given strength, as one hash."""
    said = f"{named.sha256}\0{named.template or ''}\0{tokenizer or ''}"
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _files(folder: Path, base: Path, blobs: dict[str, bytes]) -> Mapping[str, str]:
    """A tokenizer's files by name, each the hash of what is added to `blobs`."""
    named = {}
    for path in (base / _CONFIG, *tokenizer_files(folder)):
        data = path.read_bytes()
        named[path.name] = hashlib.sha256(data).hexdigest()
        blobs[named[path.name]] = data
    return named
