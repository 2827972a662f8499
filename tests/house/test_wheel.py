"""The wheel is the whole package: built, installed in a clean environment, imported from outside the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
ROOMS = ("schemas", "kernels", "store", "worker", "producer")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*command], cwd=cwd, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules() -> set[str]:
    """Every module of the package, as its path in a wheel."""
    rooms = {path.relative_to(REPO) for room in ROOMS for path in (REPO / room).rglob("*.py")}
    return {"loramill/__init__.py", *(f"loramill/{path.as_posix()}" for path in rooms)}


def data() -> set[str]:
    """What is compiled, what runs inside Redis, and what the page is made of, as paths in a wheel."""
    folders = (
        REPO / "kernels" / "cpp",
        REPO / "store" / "lua",
        REPO / "producer" / "api" / "templates",
        REPO / "producer" / "api" / "static",
    )
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {f"loramill/{path.relative_to(REPO).as_posix()}" for path in files}


def shipped(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert "loramill/py.typed" in archive.namelist()
        kinds = (".py", ".cpp", ".h", ".lua", ".html", ".css", ".js")
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(kinds)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build needs of the repository, copied with its links, so that building leaves nothing in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*ROOMS, "src"):
        hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPO / name, tree / name, symlinks=True, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """A wheel from the source distribution: what an index would get."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def test_wheel_holds_every_module(wheel: Path) -> None:
    files = shipped(wheel)
    assert set(files) == modules() | data()
    assert all(files[name] == (REPO / "src" / name).read_bytes() for name in files)


def test_wheel_from_the_tree_is_the_same(tree: Path, wheel: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "direct", cwd=tree)
    (direct,) = (tree / "direct").glob("*.whl")
    assert shipped(direct) == shipped(wheel)


def test_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "clean", cwd=tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # The dependencies come from this environment: a .pth adds its folder, but not the editable install's own .pth.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    names = sorted(path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in modules())
    imports = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    files = run(python, "-c", imports, cwd=tmp_path).split()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(site / "loramill") for file in files)
    assert "run" in run(tmp_path / "clean" / "bin" / "loramill", "--help", cwd=tmp_path)
