"""The public names: what plugins, contrib and docs use, and nothing else; nobody reaches behind a face."""

import ast
import importlib
import re

import pytest
from counts import CORE, ROOT, rooms

import luthier

USERS = [
    path
    for folder in ("plugins", "contrib", "docs", "bench", "README.md", "core/luthier/testing")
    for path in ([ROOT / folder] if (ROOT / folder).is_file() else sorted((ROOT / folder).rglob("*")))
    if path.suffix in (".py", ".md", ".template")
]
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
FACES = sorted(
    ".".join(path.parent.relative_to(ROOT / top).parts)
    for top in ("core", "plugins")
    for path in (ROOT / top).rglob("__init__.py")
)


def used():
    """Every name that is imported from `luthier`, or written as one of its attributes."""
    names = set()
    for path in USERS:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"from luthier import (\([^)]*\)|[^\n]*)", text):
            names |= set(re.findall(r"\w+", block))
        names |= set(re.findall(r"(?<![\w.])luthier\.(\w+)", text))
    return names


def test_the_public_names_are_those_that_somebody_uses():
    assert sorted(set(luthier.__all__) - used()) == []


def test_plugins_use_names_that_are_there():
    """`luthier` finds its names when they are asked for, so that a type checker cannot tell."""
    for path in PLUGINS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "luthier"
            ):
                assert node.attr in luthier.__all__, f"{path}:{node.lineno}: luthier.{node.attr}"
            if isinstance(node, ast.ImportFrom) and node.module == "luthier":
                names = {alias.name for alias in node.names} - set(rooms())
                assert names <= set(luthier.__all__), f"{path}:{node.lineno}: {names}"


def test_a_listing_shows_the_public_names():
    assert set(luthier.__all__) <= set(dir(luthier))


@pytest.mark.parametrize("face", FACES)
def test_every_name_of_a_face_is_there(face):
    package = importlib.import_module(face)
    for name in getattr(package, "__all__", []):
        assert getattr(package, name) is not None


@pytest.mark.parametrize("face", FACES)
def test_no_name_of_a_face_is_a_module_of_its_package(face):
    """Importing such a module would put it in the place of the name."""
    package = importlib.import_module(face)
    for name in getattr(package, "__all__", []):
        assert not any((one / f"{name}.py").exists() for one in map(type(CORE), package.__path__)), name


def test_no_room_is_called_like_a_public_function():
    commands = {path.name for path in (ROOT / "plugins" / "luthier_plugins" / "commands").iterdir()}
    assert not set(rooms()) & {*luthier.__all__, *commands}


def _face(module: str) -> str:
    """The package that a stranger to `module` may import."""
    parts = module.split(".")
    return ".".join(parts[: {"luthier": 2, "luthier_toolkits": 2, "luthier_plugins": 3}.get(parts[0], 9)])


@pytest.mark.parametrize(
    "path", [*sorted(CORE.rglob("*.py")), *PLUGINS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nobody_imports_deeper_than_a_face(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])
    if own == "luthier.__init__":
        return  # the names of the whole are those of the rooms, whose modules it loads one by one
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("luthier"):
            inside = f"{own}.".startswith(f"{_face(node.module)}.")
            assert inside or node.module == _face(node.module), f"line {node.lineno}: {node.module}"


def test_methods_use_public_names_and_toolkits_alone():
    for path in PLUGINS:
        place = path.relative_to(ROOT / "plugins").parts
        if place[0] != "luthier_plugins" or "commands" in place or "model_formats" in place:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("luthier."):
                assert node.module == "luthier.faces", f"{path}:{node.lineno}"
