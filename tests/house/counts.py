"""What the house measures: lines of code, imports, functions; run it to see the table of rooms.

python tests/house/counts.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "luthier"
KIT = sorted((CORE / "testing").rglob("*.py"))
"""No run imports the conformance kit: it is tests that plugin authors subclass."""
PRODUCT = [path for folder in ("core", "plugins", "conf") for path in sorted((ROOT / folder).rglob("*.py"))]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comments, nor docstrings."""
    text = path.read_text(encoding="utf-8")
    described = set()
    for node in ast.walk(ast.parse(text)):
        if _is_text(node):
            described.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in described
        for number, line in enumerate(text.splitlines(), 1)
    )


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    size = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    return size - ((first.end_lineno or first.lineno) - first.lineno + 1 if _is_text(first) else 0)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def rooms() -> list[str]:
    """The rooms of core, by name; the kit is beside them."""
    return sorted(path.parent.name for path in CORE.glob("*/__init__.py") if path.parent.name != "testing")


def files(room: str) -> list[Path]:
    return sorted((CORE / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The dotted names of modules of the house that a file imports at run time."""
    found = set()
    for node in _run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in HOUSE}


HOUSE = ("luthier", "luthier_plugins", "luthier_toolkits", "luthier_conf")


def _run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk `node`, but not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _run_time(other)
            continue
        yield child
        yield from _run_time(child)


def main() -> None:
    """Print the table of rooms."""
    for room in rooms():
        print(f"{room:12} {sum(map(code_lines, files(room))):6,} lines of code in {len(files(room))} files")
    everything = [path for path in CORE.rglob("*.py") if path not in KIT]
    print(f"{'core':12} {sum(map(code_lines, everything)):6,} lines of code in {len(everything)} files")
    widest = max(PRODUCT, key=lambda path: len(imports(path)))
    print(f"widest import list: {len(imports(widest))}, {widest.relative_to(ROOT)}")
    sizes = sorted(body_lines(node) for path in PRODUCT for node in functions(path))
    median, most = sizes[len(sizes) // 2], sizes[int(0.9 * len(sizes))]
    print(f"functions: median {median}, 90 % {most}, longest {sizes[-1]}")


if __name__ == "__main__":
    main()
