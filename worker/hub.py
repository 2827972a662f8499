"""Models and adapters on the hub: downloaded once, and found in the local cache without a network."""

from __future__ import annotations

import os
from pathlib import Path

# Weights as safetensors, configs and tokenizers: nothing that can run code, no second copy of the weights.
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def fetch(repository: str, revision: str | None = None) -> Path:
    """The folder of a repository's files at a revision (None: its main branch). Raises ValueError, in one line."""
    # transformers' own names for them: the hub client is its dependency, not ours.
    from transformers.utils.hub import LocalEntryNotFoundError, snapshot_download

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    at = f"{repository}@{revision}" if revision else repository
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except LocalEntryNotFoundError as error:
        command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
        raise ValueError(
            f"{at} is not in the hub's local cache, and the hub cannot be asked (no network, or HF_HUB_OFFLINE=1): "
            f"run `{command}` where it can be, or give a folder"
        ) from error
    except Exception as error:  # gated, unknown, no space: the hub client has two dozen errors for it
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the hub does not give {at}: {reason}") from error
