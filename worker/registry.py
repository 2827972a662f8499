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


def find(options: AdapterOptions, name: str, source: str | None = None) -> AdapterSpec:
    """Where an adapter is that is asked for while a worker runs: `source`, a path in --adapters-dir; without one, what
    the worker was given under that name, or else that sub-folder. Raises ValueError, Failure."""
    if source is None:
        registry = read_registry(options)
        if name in registry.refused:
            raise ValueError(registry.refused[name])
        if name in registry.adapters:
            return registry.adapters[name].spec
    if options.adapters_dir is None:
        raise ValueError("this worker has no --adapters-dir to look for it in")
    folder = options.adapters_dir / (source or name)
    root = options.adapters_dir.resolve()
    # Before anything else: what is outside is not even looked at.
    if not folder.resolve().is_relative_to(root):
        raise ValueError(f"{folder}: it leads out of --adapters-dir")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if out := _leads_out(folder, root):
        raise ValueError(f"{out}: the link leads out of --adapters-dir")
    return AdapterSpec(str(folder))


def _leads_out(folder: Path, root: Path) -> Path | None:
    """What in an adapter's folder is a link to somewhere outside of `root`, the folder itself included."""
    return next((one for one in (folder, *folder.iterdir()) if not one.resolve().is_relative_to(root)), None)


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
        elif out := _leads_out(entry, root):
            registry.refused[entry.name] = f"{folder / out.relative_to(root)}: the link leads out of --adapters-dir"
        else:
            registry.add(entry.name, Entry(AdapterSpec(str(path)), source, given=False))
