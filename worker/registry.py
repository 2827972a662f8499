"""Which adapters, aliases and routes a run knows, and who said so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.adapters_file import read_adapters_file
from loramill.worker.settings import AdapterOptions
from loramill.worker.specs import ADAPTER_NAME, AdapterSpec


@dataclass(slots=True, frozen=True)
class Entry:
    """A registered adapter. One that was only found in a folder, not given by name, may be unusable as long as no row
    names it."""

    spec: AdapterSpec
    source: str
    given: bool = True


@dataclass(slots=True)
class Registry:
    """Everything that was registered, in the order of the sources."""

    adapters: dict[str, Entry] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Found, and not to be used: name -> why."""
    aliases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    routes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def add(self, name: str, entry: Entry) -> None:
        """Raises Failure (USAGE) for a name that another source gave."""
        if name in self.adapters:
            raise Failure(ExitCode.USAGE, f"{self.adapters[name].source} and {entry.source} both give adapter {name!r}")
        self.adapters[name] = entry


def read_registry(options: AdapterOptions) -> Registry:
    """The adapters of all sources together.

    Raises Failure: INPUT for a file or folder that cannot be read, USAGE for a name that two sources give.
    """
    registry = Registry()
    for specs, source in ((options.adapters, "--adapter"), (options.adapters_json, "--adapters")):
        for name, spec in specs.items():
            registry.add(name, Entry(spec, source))
    if options.adapters_file is not None:
        source = f"--adapters-file {options.adapters_file}"
        try:
            file = read_adapters_file(options.adapters_file)
        except ValueError as error:
            raise Failure(ExitCode.INPUT, f"--adapters-file {error}") from error
        for name, spec in file.adapters.items():
            registry.add(name, Entry(spec, source))
        registry.aliases, registry.routes = file.aliases, file.routes
    if options.adapters_dir is not None:
        _read_folder(registry, options.adapters_dir)
    return registry


def _read_folder(registry: Registry, folder: Path) -> None:
    """Every sub-folder that has an adapter, named after it."""
    source = f"--adapters-dir {folder}"
    try:
        root = folder.resolve(strict=True)
        entries = sorted(entry for entry in root.iterdir() if (entry / "adapter_config.json").is_file())
    except OSError as error:
        raise Failure(ExitCode.INPUT, f"{source}: cannot be read: {error.strerror}") from error
    for entry in entries:
        path = folder / entry.name
        if not ADAPTER_NAME.fullmatch(entry.name):
            registry.refused[entry.name] = f"{path}: the folder's name cannot be an adapter's name"
        elif out := [one for one in (entry, *entry.iterdir()) if not one.resolve().is_relative_to(root)]:
            registry.refused[entry.name] = f"{folder / out[0].relative_to(root)}: the link leads out of --adapters-dir"
        else:
            registry.add(entry.name, Entry(AdapterSpec(str(path)), source, given=False))
