"""The adapter that every recipe saves is read by plain peft, and gives the logits that Luthier gives."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers import save_tiny, tiny_tokenizer, write_rows
from luthier import compose, train
from luthier.config import ModelConfig
from luthier.models import load_model

pytestmark = pytest.mark.slow
RECIPES = resources.files("luthier_conf") / "recipe"
SHARED = ("align/pairs", "compare/sums")
"""What recipes are made of; no recipes themselves."""
PLAIN = ("compare/full", "compare/galore")
"""Recipes whose result is a plain model."""


def recipes() -> list[str]:
    folder = Path(str(RECIPES))
    names = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml"))]
    return [name for name in names if name not in (*SHARED, *PLAIN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes")
    save_tiny(path / "base")
    pairs = [{"prompt": f"{a} then", "chosen": f" {a}{a}", "rejected": f" {a} no"} for a in "abcdefgh"]
    write_rows(path / "pairs.jsonl", pairs)
    write_rows(path / "held.jsonl", [{**row, "prompt": f"then {row['prompt']}"} for row in pairs[:2]])
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    write_rows(path / "rows.jsonl", rows)
    return path


def overrides(folder: Path, recipe: str, run_dir: Path) -> list[str]:
    """The recipe on a tiny model, two steps of a few rows."""
    words = [
        f"recipe={recipe}", f"model.path={folder}/base", "model.gguf_package=null", "model.dtype=float32",
        "batch_size=4", "max_steps=2", f"run_dir={run_dir}", "tracker=[]", "optimiser.lr=1e-2",
        "evaluation.generate=false",
    ]  # fmt: skip
    pairs = recipe.startswith("align/") or recipe == "dpo_quickstart"
    if pairs or recipe == "qlora":
        words += ["data=jsonl", f"data.path={folder}/{'pairs' if pairs else 'rows'}.jsonl"]
    else:
        words += ["data.size=8", "eval_data.size=2"]
    if recipe.startswith("align/"):
        words.append(f"eval_data.path={folder}/held.jsonl")
    if recipe == "qlora":
        words += ["optimiser=adamw", "adapter.rank=8"]  # the paged one needs CUDA
    if "qlora" in recipe:
        words += ["quantiser.compute_dtype=float32", "quantiser.double_quant=false"]
    if recipe == "rlhf":
        words += [f"~stages.{name}" for name in ("sft", "pairs", "held_out_pairs", "reward")]
        words += ["resume=null", "reward_model=[length]", "objective.max_new_tokens=4"]
    return words


@torch.no_grad()
@pytest.mark.parametrize("recipe", recipes())
def test_the_adapter_of_a_recipe_is_read_by_plain_peft(folder, tmp_path, recipe):
    with torch.enable_grad():
        result = train(compose("train", overrides(folder, recipe, tmp_path / "run")))
    ids = torch.tensor([tiny_tokenizer()("What is 12 + 7? The answer is")["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    before = base(ids).logits
    theirs = PeftModel.from_pretrained(base, result.run_dir / "model").eval()(ids).logits
    loaded = load_model(
        ModelConfig(path=f"{folder}/base", adapter=str(result.run_dir), dtype="float32"), train_base=False
    )
    ours = loaded.model(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 1e-4  # two steps have changed something
