"""Load a few modules of somebody's checkout by their files, without running that package's own start.

vLLM and SGLang pull a server in when they are imported. Their kernels need little of it: what they do need is given
here as small stand-ins, and anything else that they ask for is an error that says so.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.peers.kernel_forms import AbsentError


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of one package: stand-ins, real files, and empty parents of both."""

    def __init__(self, package: str, files: Mapping[str, Path], given: Mapping[str, Mapping[str, object]]) -> None:
        self.package, self.files, self.given = package, files, given
        named = [*files, *given]
        self.parents = {name.rsplit(".", depth)[0] for name in named for depth in range(1, name.count(".") + 1)}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.files:
            return importlib.util.spec_from_file_location(name, self.files[name])
        if name in self.given or name in self.parents:
            return ModuleSpec(name, self, is_package=name in self.parents)
        raise ModuleNotFoundError(f"it asks for {name}, for which there is no stand-in", name=name)

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual module."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.given.get(module.__name__, {}))


def load(package: str, files: Mapping[str, Path], given: Mapping[str, Mapping[str, object]]) -> list[ModuleType]:
    """The modules `files`, by their dotted names, in that order; `given` are stand-ins' names.

    Raises:
        AbsentError: a file is missing, or importing it failed.
    """
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise AbsentError(f"there is no {missing[0]}")
    if package in sys.modules:
        raise AbsentError(f"{package} has been imported already")
    finder = _Finder(package, files, given)
    sys.meta_path.insert(0, finder)
    try:
        return [importlib.import_module(name) for name in files]
    except Exception as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        raise AbsentError(f"{type(error).__name__}: {error}") from error
    finally:
        sys.meta_path.remove(finder)


def chosen(function: Callable[..., Any], given: Mapping[str, object]) -> dict[str, object]:
    """Of `given`, the arguments that `function` takes: versions differ in a few.

    Raises:
        AbsentError: it asks for another one.
    """
    parameters = inspect.signature(function).parameters
    unknown = [name for name, one in parameters.items() if one.default is one.empty and name not in given]
    if unknown:
        raise AbsentError(f"{function.__name__} asks for {', '.join(unknown)}, which this benchmark does not know")
    return {name: value for name, value in given.items() if name in parameters}
