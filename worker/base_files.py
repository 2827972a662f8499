"""The base model's folder as the queue side sees it: tokenizer files and chat templates, never its weights."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker import hub

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|chat_template.*|special_tokens_map.json|added_tokens.json|vocab.*|merges.txt"
)


def silence_libraries() -> None:
    """No progress bars, advice or warnings of the libraries below: stderr is ours, and they name no file and line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def locate_base(path_or_id: str) -> Path:
    """The folder of a base model: one that exists, or the hub's, downloaded if it is not in the local cache.

    Raises Failure (INPUT).
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(path_or_id):
        raise Failure(ExitCode.INPUT, f"--base-model {path_or_id}: no such folder")
    try:
        return hub.fetch(path_or_id)
    except ValueError as error:
        raise Failure(ExitCode.INPUT, f"--base-model {path_or_id}: no such folder, and {error}") from error


def base_name_of(path_or_id: str) -> str:
    """What job lines call the base unless told otherwise: the last part of its path or hub id."""
    return Path(path_or_id).name or Path(path_or_id).resolve().name


def read_template(path: Path) -> str:
    """A chat template given as a file. Raises Failure (INPUT)."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Failure(ExitCode.INPUT, f"--chat-template {path}: cannot be read: {reason}") from error


def adapter_template(folder: Path) -> str | None:
    """The chat template that an adapter brings, as transformers saves one; None without.

    Raises ValueError (one line) for one that cannot be read.
    """
    jinja = folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    try:
        if jinja.is_file():
            return jinja.read_text(encoding="utf-8")
        if config.is_file():
            return _template_of(json.loads(config.read_bytes()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: its chat template cannot be read: {error}") from error
    return None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a base's or an adapter's tokenizer and chat template, by name."""
    return sorted(path for path in folder.iterdir() if _TOKENIZER_FILES.fullmatch(path.name) and path.is_file())


def tokenizer_sha256(folder: Path) -> str:
    """Identifies a base's or an adapter's tokenizer and chat template, by the content of their files."""
    digest = hashlib.sha256()
    for path in tokenizer_files(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _template_of(config: Any) -> str | None:
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
