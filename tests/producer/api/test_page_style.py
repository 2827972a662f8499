"""The page's style and templates as they are written: contrast, and what the content policy lets pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramill.producer.api import page
from tests.producer.api.paged import Seen

CSS = Path(page.__file__).parent / "static" / "page.css"
TEMPLATES = sorted((Path(page.__file__).parent / "templates").glob("*.html"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_keep_to_the_policy(path: Path) -> None:
    found = Seen(path.read_text())
    assert not [name for _, attributes in found.tags for name in attributes if name == "style" or name.startswith("on")]
    assert all("src" in one for one in found.all("script"))
    assert "| safe" not in path.read_text().replace("{{ css | safe }}", "")
    elsewhere = re.findall(r'(?:href|src|action)="(?:https?:)?//', path.read_text())
    assert elsewhere == []


def colours(css: str) -> Iterator[dict[str, str]]:
    """The custom properties of each scheme."""
    for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        yield dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05), of relative luminances."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


TEXT = [
    *((ink, ground) for ink in ("ink", "faint") for ground in ("ground", "card", "sunk")),
    *(("accent", ground) for ground in ("ground", "card", "sunk", "accent-soft")),
    *((tone, ground) for tone in ("good", "warn", "bad") for ground in ("card", f"{tone}-soft")),
    *(("faint", "accent-soft"), ("ink", "accent-soft"), ("bad", "ground"), ("on-accent", "accent")),
]
SHAPES = [("edge", "card"), ("accent", "sunk"), ("good", "sunk"), ("warn", "sunk"), ("edge", "ground")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(scheme: str) -> None:
    light, dark = colours(CSS.read_text())
    found = light if scheme == "light" else light | dark
    assert set(dark) == set(light)
    for pairs, least in ((TEXT, 4.5), (SHAPES, 3.0)):
        measured = {pair: round(contrast(found[pair[0]], found[pair[1]]), 2) for pair in pairs}
        assert {pair: ratio for pair, ratio in measured.items() if ratio < least} == {}


def test_contrast_is_computed_as_wcag_does() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def test_colours_are_named_once() -> None:
    css = CSS.read_text()
    rules = re.sub(r":root \{.*?\}", "", css, flags=re.DOTALL)
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\s,)])", rules) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", rules))
    named = set(re.findall(r"--([\w-]+):", css))
    assert used == named
