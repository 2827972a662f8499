"""Who may import whom, from the source alone, and the habits of the house that a machine can see."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
ROOMS = ("schemas", "kernels", "store", "worker", "producer")

# Beyond the standard library, numpy, the room itself and the package's version.
PACKAGE = {"loramill", "loramill.__version__"}
ENGINE = {"loramill.kernels", "torch", "transformers", "safetensors"}
SETTINGS = {
    f"loramill.worker.{name}" for name in ("settings", "specs", "adapters_file", "worker_settings", "durations")
}
QUEUE_SIDE = {
    f"loramill.worker.{name}"
    for name in (
        *("settings", "specs", "adapters_file", "registry", "hub", "base_files", "tokenizers", "models"),
        *("shard_runner", "shard", "twins", "result_lines", "deltas", "loading", "serving", "express"),
        *("app", "tickets", "serve", "node", "housekeeping", "leases", "shard_run", "drain", "stopwatch", "devices"),
        *("worker_settings", "durations", "worker_log", "lifeline", "child", "engine_process", "handle", "manifest"),
        *("frames", "adapters_wanted", "changes", "offered", "worker_stats"),
    )
}
WEB = {
    "fastapi",
    "starlette",
    "uvicorn",
    "h11",
    "python_multipart",
    "jinja2",
    "prometheus_client",
    "httpx2",
    "pydantic",
    "orjson",
}
ALLOWED = {
    "schemas": {"pydantic", "orjson"},
    "kernels": {"torch", "triton"},
    "store": {"loramill.schemas", "fsspec", "orjson", "redis", "zstandard"},
    "worker": ENGINE,
    "the queue side": {"loramill.schemas", "loramill.store", "orjson", "click", "celery", "kombu", "redis", *ENGINE},
    "producer": {"loramill.schemas", "loramill.store", *SETTINGS, "click", "rich", "zstandard", "transformers", *WEB},
    "producer/local.py": {"loramill.worker", "loramill.schemas", "loramill.store"},
    "producer/catalogue.py": {"loramill.worker", "loramill.schemas", "click"},
    "producer/doctor_engine.py": {"loramill.worker", "loramill.kernels", "torch"},
    "producer/verify.py": {"loramill.worker", "loramill.schemas", "click", "torch", "transformers", "peft"},
    "producer/run.py": {
        *("loramill.worker.models", "loramill.worker.base_files", "loramill.worker.devices"),
        *("loramill.schemas", "loramill.store"),
    },
    "producer/run_job.py": {"loramill.worker.models", "loramill.schemas", "loramill.store"},
    "producer/run_engines.py": {"loramill.worker", "loramill.schemas"},
    "producer/run_devices.py": {"loramill.worker", "loramill.schemas", "loramill.store"},
    "producer/worker_command.py": {"loramill.worker", "loramill.schemas"},
    "producer/embedded.py": {"loramill.worker.lifeline", "loramill.schemas"},
    "producer/mill.py": {"loramill.worker.models", *SETTINGS, "loramill.schemas", "loramill.store"},
    "producer/offers.py": {"loramill.worker.tokenizers", "loramill.schemas", "loramill.store"},
    "producer/served.py": {
        *("loramill.worker.models", "loramill.worker.manifest"),
        *(*SETTINGS, "loramill.schemas", "loramill.store"),
    },
    "producer/announce.py": {"loramill.worker.tickets", "loramill.store"},
    "producer/submit_file.py": {"loramill.worker.base_files", "loramill.schemas", "loramill.store"},
}

# Only inside functions: whoever asks for --help or only validates must not wait for these.
LAZY = {"producer": {"torch", "transformers"}, "the queue side": {"transformers"}}
SLOW = {"torch", "triton", "transformers", "safetensors", "peft", "celery", "kombu", "fastapi", "uvicorn"}

# Decide, and do nothing else: no torch, no files, no clock, neither here nor in what they import.
PURE = (
    *("worker/scheduler.py", "worker/room.py", "worker/pages.py", "worker/slots.py"),
    *("worker/forecast.py", "worker/pressure.py"),
    *("producer/plan.py", "producer/waves.py", "producer/units.py", "producer/work.py", "producer/costs.py"),
    *("producer/modes.py", "producer/predict.py", "producer/traffic.py", "producer/explain.py"),
    *("producer/prefixes.py", "producer/shards.py"),
)
PURE_LIBRARY = {
    *("__future__", "array", "bisect", "collections", "dataclasses", "enum", "functools", "heapq", "itertools", "math"),
    *("numpy", "operator", "typing"),
}
MAX_LINES = 300


@dataclass(frozen=True)
class Import:
    """One imported module, absolute; `lazy` is inside a function or for the type checker alone."""

    module: str
    lazy: bool
    line: int


def imports_of(source: str, module: str) -> Iterator[Import]:
    """Every import in a module's source; `from a import b` gives both a and a.b, since b may be a module."""
    package = module.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(origin, lazy, node.lineno)
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", lazy, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            target = node.args[0]
            name = target.value if isinstance(target, ast.Constant) else "<computed>"
            yield Import(str(name), lazy, node.lineno)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            lazy = True
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(source), False)


def module_name(path: str) -> str:
    """`store/files.py` is loramill.store.files."""
    return "loramill." + path.removesuffix(".py").replace("/", ".")


def inside(module: str, names: set[str]) -> bool:
    """Whether a module is one of these or lies in one of them."""
    return any(module == name or module.startswith(name + ".") for name in names)


def problems(path: str, source: str) -> list[str]:
    """What the source of `room/name.py` breaks, one line each."""
    room, module = path.split("/")[0], module_name(path)
    side = "the queue side" if module in QUEUE_SIDE else room
    allowed = {"numpy", f"loramill.{room}", *ALLOWED.get(path, ALLOWED[side])}
    found = []
    for imported in imports_of(source, module):
        name, where = imported.module, f"{path}:{imported.line}"
        top = name.split(".")[0]
        if name not in PACKAGE and top not in sys.stdlib_module_names and not inside(name, allowed):
            found.append(f"{where} {side} must not import {name}")
        if room == "worker" and inside(name, QUEUE_SIDE) and module not in QUEUE_SIDE:
            found.append(f"{where} the engine side must not import the queue side ({name})")
        if not imported.lazy and inside(name, LAZY.get(side, set())):
            found.append(f"{where} {name} must be imported inside a function")
        if name == "<computed>":
            found.append(f"{where} a computed import cannot be checked")
    return found


def impurities(path: str, tree: dict[str, str]) -> list[str]:
    """Why a module is more than a decision: what it, or any module of ours that it needs, imports or opens."""
    waiting, seen, found = [path], {path}, list[str]()
    while waiting:
        here = waiting.pop()
        for imported in imports_of(tree[here], module_name(here)):
            file = imported.module.removeprefix("loramill.").replace(".", "/") + ".py"
            if file in tree and file not in seen:
                seen.add(file)
                waiting.append(file)
            if imported.module.split(".")[0] not in PURE_LIBRARY | PACKAGE:
                found.append(f"{here}:{imported.line} a pure module must not import {imported.module}")
        calls = (node for node in ast.walk(ast.parse(tree[here])) if isinstance(node, ast.Call))
        acts = [call.lineno for call in calls if ast.unparse(call.func) in ("open", "print", "input")]
        found += [f"{here}:{line} a pure module must not read or write" for line in acts]
    return found


def loaded_with(path: str, tree: dict[str, str]) -> set[str]:
    """The modules of ours that importing `path` imports at once, directly or through others of them."""
    waiting, seen = [path], set[str]()
    while waiting:
        here = waiting.pop()
        for imported in imports_of(tree[here], module_name(here)):
            file = imported.module.removeprefix("loramill.").replace(".", "/") + ".py"
            if not imported.lazy and file in tree and file not in seen:
                seen.add(file)
                waiting.append(file)
    return seen


def slow_imports(path: str, tree: dict[str, str]) -> list[str]:
    """What importing `path` waits for: slow libraries that it, or a module of ours that comes with it, imports."""
    return [
        f"{here}:{imported.line} {imported.module}"
        for here in sorted({path, *loaded_with(path, tree)})
        for imported in imports_of(tree[here], module_name(here))
        if not imported.lazy and inside(imported.module, SLOW)
    ]


def sources() -> dict[str, str]:
    paths = (path for room in ROOMS for path in sorted((REPO / room).rglob("*.py")))
    return {path.relative_to(REPO).as_posix(): path.read_text() for path in paths}


def repository_files() -> list[Path]:
    """Tracked files and those about to be; without git, every file outside hidden and built folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=REPO, capture_output=True
    )
    if listing.returncode == 0:
        found = [REPO / name for name in listing.stdout.decode().split("\0") if name]
    else:
        built = {".cache", "out", "build", "dist", "__pycache__"}
        found = [
            path
            for path in REPO.rglob("*")
            if not any(p.startswith(".venv") or p.endswith((".egg-info", "_cache")) or p in built for p in path.parts)
        ]
    return [path for path in found if path.is_file() and not path.is_symlink()]


@pytest.mark.parametrize("path", sources())
def test_imports(path: str) -> None:
    assert problems(path, sources()[path]) == []


@pytest.mark.parametrize("path", ["producer/cli.py", "worker/settings.py"])
def test_usage_errors_are_instant(path: str) -> None:
    """The command line, and the settings that a queue's workers share with it, come without the engine: what needs it
    is imported inside functions, when a command that uses it runs."""
    assert slow_imports(path, sources()) == []


def test_the_command_line_loads_no_more_of_the_worker_than_its_settings() -> None:
    loaded = {module_name(path) for path in loaded_with("producer/cli.py", sources()) if path.startswith("worker/")}
    assert loaded == SETTINGS


def test_slow_imports_are_seen_through_other_modules() -> None:
    tree = {
        "producer/cli.py": "from loramill.worker.settings import flag",
        "worker/settings.py": "from loramill.worker import models\ndef f():\n    import transformers",
        "worker/models.py": "from loramill.worker.adapters import open_adapter",
        "worker/adapters.py": "import torch",
    }
    assert slow_imports("producer/cli.py", tree) == ["worker/adapters.py:1 torch"]


def test_the_loading_is_seen_through_other_modules() -> None:
    tree = {
        "producer/cli.py": "from loramill.producer import run\ndef f():\n    import loramill.worker.model",
        "producer/run.py": "from .local import LocalEngine",
        "producer/local.py": "from loramill.worker.engine import Engine",
        "worker/engine.py": "",
        "worker/model.py": "",
    }
    assert loaded_with("producer/cli.py", tree) == {"producer/run.py", "producer/local.py", "worker/engine.py"}


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("schemas/x.py", "import torch", "must not import torch"),
        ("schemas/x.py", "def f():\n    from loramill.store import journal", "must not import loramill.store"),
        ("kernels/x.py", "from ..worker import model", "must not import loramill.worker"),
        ("store/x.py", "from transformers import AutoTokenizer", "must not import transformers"),
        ("worker/engine.py", "from pydantic import BaseModel", "must not import pydantic"),
        ("worker/engine.py", "from loramill.worker import shard_runner", "must not import the queue side"),
        ("worker/engine.py", "from .shard_runner import run", "must not import the queue side"),
        ("worker/engine.py", "from loramill.worker.settings import flag", "must not import the queue side"),
        ("worker/engine.py", "import click", "worker must not import click"),
        ("worker/models.py", "import rich", "must not import rich"),
        ("worker/models.py", "from loramill.producer import plan", "must not import loramill.producer"),
        ("worker/tokenizers.py", "import transformers", "inside a function"),
        ("producer/run.py", "from loramill.worker.engine import Engine", "must not import loramill.worker.engine"),
        ("producer/cli.py", "import transformers", "inside a function"),
        ("producer/cli.py", "def f():\n    import loramill.worker.engine", "must not import loramill.worker"),
        ("producer/cli.py", "def f():\n    __import__('loramill.worker')", "must not import loramill.worker"),
        ("producer/cli.py", "import importlib\nimportlib.import_module(name)", "computed import"),
        ("producer/cli.py", "from loramill import Mill", "must not import loramill.Mill"),
    ],
)
def test_the_checker_sees(path: str, source: str, message: str) -> None:
    assert any(message in problem for problem in problems(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("producer/local.py", "def f():\n    from loramill.worker.engine import Engine"),
        ("producer/reader.py", "def f():\n    from transformers import AutoTokenizer"),
        ("worker/shard_runner.py", "from loramill.store import journal\nfrom .engine import Engine"),
        ("producer/cli.py", "import loramill\nfrom loramill import __version__"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert problems(path, source) == []


@pytest.mark.parametrize("path", PURE)
def test_deciding_is_pure(path: str) -> None:
    assert impurities(path, sources()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import pathlib", "must not import pathlib"),
        ("import torch", "must not import torch"),
        ("from loramill.worker.cache import Cache", "worker/cache.py:1 a pure module must not import torch"),
        ("from .cache import Cache", "worker/cache.py:1 a pure module must not import torch"),
        ("f = open('x')", "must not read or write"),
    ],
)
def test_the_checker_sees_impurity(source: str, message: str) -> None:
    found = impurities("worker/slots.py", {"worker/slots.py": source, "worker/cache.py": "import torch"})
    assert any(message in problem for problem in found)


def test_the_checker_lets_pure_code_pass() -> None:
    tree = {"worker/slots.py": "import numpy as np\nfrom .request import Row", "worker/request.py": "import math"}
    assert impurities("worker/slots.py", tree) == []


@pytest.mark.parametrize("code", ["import loramill", "from loramill.producer.cli import main; main(['--help'])"])
def test_heavy_libraries_stay_out(code: str) -> None:
    """`import loramill` and `loramill --help` load neither torch nor transformers."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "loramill" in loaded
    assert not loaded & {"torch", "transformers"}


def test_rooms_are_relative_links() -> None:
    for room in ROOMS:
        link = REPO / "src" / "loramill" / room
        assert link.readlink() == Path("../..") / room
        assert (link / "__init__.py").is_file()


def test_modules_are_short() -> None:
    shipped = [path for path in repository_files() if path.suffix == ".py" and "tests" not in path.parts]
    long = {path.relative_to(REPO).as_posix(): len(path.read_text().splitlines()) for path in shipped}
    assert {path: lines for path, lines in long.items() if lines > MAX_LINES} == {}


def test_type_ignores_carry_a_code() -> None:
    bare = re.compile(r"#\s*type:\s*ignore(?!\[)")
    python = [path for path in repository_files() if path.suffix == ".py"]
    assert [str(path) for path in python if bare.search(path.read_text())] == []


def test_no_machine_is_named() -> None:
    """No file of the repository knows a path or a package index of the machine where it was written."""
    folders = "|".join(["home", "root", "Users", "work", "mnt"])
    hosts = "|".join([r"py" + r"pi\.org", r"python" + r"hosted\.", r"download\.py" + r"torch\."])
    named = re.compile(rf"(?<![\w.*}})])/(?:{folders})/\w|{hosts}")
    found = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPO)}: {match[0]}" for match in named.finditer(text)]
    assert found == []
