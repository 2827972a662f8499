"""constraints.txt pins, exactly and within the ranges, everything that pyproject.toml asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[2]


def pins() -> dict[str, Requirement]:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in parsed}


def wanted() -> list[Requirement]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize("pin", pins().values(), ids=str)
def test_pins_are_exact_and_fit_every_build(pin: Requirement) -> None:
    """No URL and no local version: a CPU and a CUDA build of torch both satisfy the pin."""
    assert pin.url is None
    assert "+" not in version(pin)


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_requirements_are_pinned_within_their_range(requirement: Requirement) -> None:
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version(pin))
