"""Draw docs/floors.svg, the floors of core, from the import-linter contract in pyproject.toml.

    python docs/draw_floors.py [FILE]

What a room is for is the first line of its face.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, LEFT, STEP = 900, 34, 24, 40
INK, FRAME, FILL, SIDE = "#1f2933", "#9fb3c8", "#f0f4f8", "#e3f0e8"


def main() -> None:
    """Write the picture."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "floors.svg"
    file.write_text(drawn(floors()), encoding="utf-8")


def floors() -> list[str]:
    """Return the rooms, the upper floors first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return next(one["layers"] for one in contracts["contracts"] if one.get("containers") == ["luthier"])


def purpose(room: str) -> str:
    """Return what a room is for, in its own words."""
    place = ROOT / "core" / "luthier" / room
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return said.partition("\n")[0].rstrip(".").replace("`", "")


def drawn(rooms: list[str]) -> str:
    """Return the picture as SVG."""
    outside = [
        ("contrib", "packages of strangers: public names only"),
        ("plugins", "methods and commands, independent of each other; toolkits that they share"),
    ]
    boxes = [_box(place, name, text, SIDE) for place, (name, text) in enumerate(outside)]
    boxes += [_box(place, room, purpose(room), FILL) for place, room in enumerate(rooms, len(outside))]
    height = len(boxes) * STEP + 64
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
        f'<text x="{LEFT}" y="30" font-size="16" font-weight="600">'
        "A floor imports only floors below it</text>\n" + "".join(boxes) + "</svg>\n"
    )


def _box(place: int, name: str, text: str, fill: str) -> str:
    top = 48 + place * STEP
    return (
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH - 2 * LEFT}" height="{HEIGHT}" rx="5" '
        f'fill="{fill}" stroke="{FRAME}"/>\n'
        f'<text x="{LEFT + 14}" y="{top + 22}" font-weight="600">{escape(name)}</text>\n'
        f'<text x="{LEFT + 130}" y="{top + 22}">{escape(text)}</text>\n'
    )


if __name__ == "__main__":
    main()
