"""Everything that branches on the type of device, and the test that stands in for a GPU on a CPU."""

import ast

from counts import PRODUCT, ROOT

PAGED = "tests/plugins/optimisers/test_bitsandbytes_adamw.py"
STAND_INS = {
    "core/luthier/policy/attention.py": "tests/core/policy/test_masked_attention.py",
    "core/luthier/policy/forward.py": "tests/core/policy/test_masked_attention.py",
    "core/luthier/policy/row_blocks.py": "tests/core/policy/test_row_blocks.py",
    "core/luthier/runs/state.py": "tests/core/runs/test_random_states.py",
    "core/luthier/system/memory.py": "tests/core/system/test_memory.py",
    "core/luthier/system/precision.py": "tests/core/system/test_precision.py",
    "plugins/luthier_plugins/commands/plan/observer.py": "tests/commands/plan/test_planning.py",
    "plugins/luthier_plugins/commands/plan/planning.py": "tests/commands/plan/test_planning.py",
    "plugins/luthier_plugins/commands/plan/simulation.py": "tests/commands/plan/test_plan_simulation.py",
    "plugins/luthier_plugins/optimisers/paged_adamw.py": PAGED,
    "plugins/luthier_plugins/optimisers/paged_adamw_8bit.py": PAGED,
    "plugins/luthier_toolkits/bitsandbytes/library.py": PAGED,
}
"""By module that names CUDA: the test that goes the same way on a CPU."""


def names_cuda(node: ast.AST) -> bool:
    """Whether a piece of code compares with CUDA, or asks torch about it."""
    if isinstance(node, ast.Constant):
        return node.value == "cuda"
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.backends.cuda")


def test_what_branches_on_the_device_is_known_and_has_a_stand_in():
    named = {
        str(path.relative_to(ROOT))
        for path in PRODUCT
        if any(map(names_cuda, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert named == set(STAND_INS)
    assert all("cuda" in (ROOT / test).read_text(encoding="utf-8") for test in STAND_INS.values())
