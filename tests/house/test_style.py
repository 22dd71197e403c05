"""The budgets of the house: sizes, docstrings, type hints — measured, not promised."""

import ast
import statistics

import pytest
from counts import KIT, PRODUCT, ROOT, body_lines, code_lines, functions, lines

# A method's file, or a file of its folder; commands, formats and toolkits are larger things.
METHODS = [
    path
    for path in (ROOT / "plugins" / "luthier_plugins").rglob("*.py")
    if path.name != "__init__.py" and not {"commands", "model_formats"} & set(path.parts)
]


def test_files_are_short():
    sizes = {path: lines(path) for path in PRODUCT if path.name != "__init__.py"}
    assert statistics.median(sizes.values()) <= 120
    assert {path: size for path, size in sizes.items() if size > 300} == {}
    assert {path: lines(path) for path in METHODS if lines(path) > 150} == {}


def test_functions_are_short():
    sizes = sorted(body_lines(node) for path in PRODUCT for node in functions(path))
    assert statistics.median(sizes) <= 10
    assert sizes[int(0.9 * len(sizes))] <= 35
    assert sizes[-1] <= 60


def test_there_is_as_much_test_as_code():
    tests = sum(lines(path) for path in (ROOT / "tests").rglob("*.py"))
    assert tests >= sum(code_lines(path) for path in PRODUCT if path not in KIT)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_described_and_typed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    hidden = list(_hidden(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert node in hidden or ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare} untyped"
            assert node.returns is not None, f"{node.name} has no return type"


def _hidden(tree: ast.Module):
    """What stands in a function or in a private class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.ClassDef) and node.name.startswith("_")
        ):
            yield from (inner for inner in ast.walk(node) if inner is not node)


def test_no_config_can_import_anything():
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert "_target_" not in path.read_text(encoding="utf-8"), path


def test_core_names_no_method():
    """A method's name in core means the hook spec was not enough."""
    names = {path.stem for path in METHODS} - {"full"}
    for path in (ROOT / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
                assert not names & {c for c in constants if isinstance(c, str)}, f"{path}:{node.lineno}"


def test_no_run_was_left_in_the_root():
    """A run in the folder that tests start in is a test's mistake, and is soon committed."""
    written = ["checkpoints", "config.yaml", "metrics.jsonl", "model", "samples.jsonl", "summary.json"]
    assert [name for name in written if (ROOT / name).exists()] == []
