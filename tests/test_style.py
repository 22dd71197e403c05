"""The budgets of the house: sizes, docstrings, type hints — measured, not promised."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = [path for folder in ("core", "plugins", "conf") for path in sorted((ROOT / folder).rglob("*.py"))]
# No run imports the conformance kit: it is tests that plugin authors subclass.
KIT = sorted((ROOT / "core" / "luthier" / "testing").rglob("*.py"))
METHODS = [path for path in (ROOT / "plugins").rglob("*.py") if path.name != "__init__.py"]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comments, nor docstrings."""
    text = path.read_text(encoding="utf-8")
    described = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            described.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in described
        for number, line in enumerate(text.splitlines(), 1)
    )


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    size = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        size -= (first.end_lineno or first.lineno) - first.lineno + 1
    return size


def test_files_are_short():
    sizes = {path: lines(path) for path in PRODUCT if path.name != "__init__.py"}
    assert statistics.median(sizes.values()) <= 120
    assert {path: size for path, size in sizes.items() if size > 300} == {}
    assert {path: lines(path) for path in METHODS if lines(path) > 150} == {}


def test_core_is_small():
    # The budget was 2,500 before the attention, the head and the saved formats were written in core (3,300):
    # they serve every method, and moving them elsewhere would not make them smaller. Since then: data
    # (layouts, tree store, overflow, files, templates) 850; checkpoints, resume, processes, meters 850;
    # preview 340; fused functions 330; the generator of packages 150. Since then: plan (shapes, simulation,
    # ranking, table) 1,000; bitsandbytes' layers and optimisers 220; subspaces 200; fold 220; row norms 160;
    # combinations, presets and Adam's groups 130. Since then: preference (pairs, labels, their rows and
    # findings, references, pooling, combined objectives) 850; sampling and generation 200; screen, adapters
    # that go on, wide residuals 200; score heads, judges, rollouts, best-of-N and stages 1,900; merging
    # (files, plans, selection, adapters, hashes, reports) 2,000. The kit is no part of it: see KIT.
    assert sum(code_lines(path) for path in (ROOT / "core").rglob("*.py") if path not in KIT) <= 13_300


def test_the_kit_is_imported_by_tests_only():
    for path in PRODUCT:
        if path not in KIT:
            assert "luthier.testing" not in _imports(path), path


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {".".join(name.split(".")[:2]) for name in names}


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


def test_plugins_import_only_public_names():
    for path in METHODS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("luthier."), f"{path}:{node.lineno}"


def test_no_run_was_left_in_the_root():
    """A run in the folder that tests start in is a test's mistake, and is soon committed."""
    written = ["checkpoints", "config.yaml", "metrics.jsonl", "model", "samples.jsonl", "summary.json"]
    assert [name for name in written if (ROOT / name).exists()] == []
