"""Which adapters a run knows: names to folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loramill.producer.failures import ExitCode, Failure
from loramill.producer.options import ADAPTER_NAME


@dataclass(slots=True)
class AdapterFolders:
    """Adapters by name. Those that were only found, not given one by one, may be unusable as long as no row names
    them."""

    given: dict[str, Path]
    found: dict[str, Path] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Found, and not to be used: name -> why."""

    def all(self) -> dict[str, Path]:
        """Every adapter that can be tried, the given ones first."""
        return self.given | self.found


def find_adapters(given: Mapping[str, Path], folder: Path | None) -> AdapterFolders:
    """`given`, and every sub-folder of `folder` that has an adapter, named after it.

    Raises Failure: INPUT if the folder cannot be read, USAGE for a name that both have.
    """
    known = AdapterFolders(dict(given))
    if folder is None:
        return known
    try:
        root = folder.resolve(strict=True)
        entries = sorted(entry for entry in root.iterdir() if (entry / "adapter_config.json").is_file())
    except OSError as error:
        raise Failure(ExitCode.INPUT, f"--adapters-dir {folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name in given:
            raise Failure(ExitCode.USAGE, f"--adapter {entry.name} and --adapters-dir {folder} both give that name")
        if not ADAPTER_NAME.fullmatch(entry.name):
            known.refused[entry.name] = f"{folder / entry.name}: the folder's name cannot be an adapter's name"
        elif not entry.resolve().is_relative_to(root):
            known.refused[entry.name] = f"{folder / entry.name}: the link leads out of --adapters-dir"
        else:
            known.found[entry.name] = folder / entry.name
    return known
