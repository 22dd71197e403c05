"""Adapters merged: on what they add to the weights, into a model or an adapter, of any rank and scale."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import save_tiny, tiny_gpt2, tiny_tokenizer
from luthier import ConfigError, ModelError, compose
from luthier_plugins.commands.merge import merge

pytestmark = pytest.mark.slow

IDS = torch.arange(40, 60)[None]


def adapter(folder, base, seed, **options):
    """Save a PEFT adapter whose factors are all random."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                one.copy_(0.3 * torch.randn(one.shape, generator=generator))
            elif "magnitude" in name:
                one.mul_(1 + 0.1 * torch.rand(one.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters of several ranks, targets and scales, and their base."""
    root = tmp_path_factory.mktemp("adapters")
    base = root / "base"
    save_tiny(base, hidden_size=64, intermediate_size=96)
    adapter(root / "a", base, 1)
    adapter(root / "b", base, 2, r=6, target_modules=["q_proj", "down_proj"])
    adapter(root / "c", base, 3, r=9, lora_alpha=6, use_rslora=True)
    adapter(root / "d", base, 4, use_dora=True)
    return root


def merged(root, run_dir, labels, *more):
    paths = ", ".join(f"{label}: {root / label}" for label in labels)
    return merge(compose("merge", [f"models={{{paths}}}", f"run_dir={run_dir}", *more]))


def whole(base, folder) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter folded into its base, by PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {name: one.clone() for name, one in model.merge_and_unload().state_dict().items()}


def expected(root, labels, factors):
    """Return the base plus the weighted changes of the adapters."""
    base = AutoModelForCausalLM.from_pretrained(root / "base").state_dict()
    changed = [whole(root / "base", root / label) for label in labels]
    return {
        name: one + sum(f * (other[name] - one) for f, other in zip(factors, changed, strict=True))
        for name, one in base.items()
    }


def close(found, wanted):
    assert wanted.keys() - found.keys() <= {"lm_head.weight"}  # tied, and written once
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5)


LABELS = ("a", "b", "c")


def test_adapters_merge_into_a_model_by_what_they_add(adapters, tmp_path):
    labels = (*LABELS, "d")
    report = merged(adapters, tmp_path / "run", labels, "merger=task_arithmetic", "merger.scaling=0.5")
    wanted = expected(adapters, labels, [0.5] * 4)
    close(load_file(report.model_dir / "model.safetensors"), wanted)


def test_adapters_merge_into_an_adapter_exactly(adapters, tmp_path):
    report = merged(
        adapters, tmp_path / "run", LABELS, "merger=soup", "result=adapter", "+merger.weights.b=2"
    )
    wanted = expected(adapters, LABELS, [0.25, 0.5, 0.25])
    close(whole(adapters / "base", report.model_dir), wanted)
    assert json.loads((report.model_dir / "adapter_config.json").read_text())["r"] == 4 + 6 + 9
    assert report.discarded == {}


def test_an_adapter_is_cut_to_the_best_of_its_rank(adapters, tmp_path):
    report = merged(adapters, tmp_path / "run", LABELS, "merger=task_arithmetic", "result=adapter", "rank=5")
    base = AutoModelForCausalLM.from_pretrained(adapters / "base").state_dict()
    wanted, found = expected(adapters, LABELS, [1, 1, 1]), whole(adapters / "base", report.model_dir)
    for layer, lost in report.discarded.items():
        change = wanted[f"{layer}.weight"] - base[f"{layer}.weight"]
        u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
        best = u[:, :5] * s[:5] @ v[:5]
        own = (found[f"{layer}.weight"] - base[f"{layer}.weight"]).double()
        torch.testing.assert_close(own, best, rtol=0, atol=1e-5)
        assert lost == pytest.approx(float(s[5:].square().sum() / s.square().sum()), abs=1e-6)
    assert max(report.discarded.values()) > 0.05


@pytest.mark.parametrize("method", [["merger=ties"], ["merger=ties", "merger.trim=model"], ["merger=dare"]])
def test_what_is_of_no_low_rank_is_made_of_whole_changes(adapters, tmp_path, method):
    full = merged(adapters, tmp_path / "full", LABELS, *method)
    with pytest.raises(ConfigError, match="of no low rank: set rank=R, or result=model"):
        merged(adapters, tmp_path / "none", LABELS, *method, "result=adapter")
    report = merged(adapters, tmp_path / "run", LABELS, *method, "result=adapter", "rank=64")
    assert max(report.discarded.values()) < 1e-6  # 64 is the whole of the shorter side
    close(whole(adapters / "base", report.model_dir), load_file(full.model_dir / "model.safetensors"))


def test_dora_is_merged_by_its_change_too(adapters, tmp_path):
    report = merged(adapters, tmp_path / "run", ("a", "d"), "merger=soup", "result=adapter", "rank=64")
    close(whole(adapters / "base", report.model_dir), expected(adapters, ("a", "d"), [0.5, 0.5]))
    with pytest.raises(ConfigError, match="such adapters' merge is of no low rank"):
        merged(adapters, tmp_path / "none", ("a", "d"), "merger=soup", "result=adapter")


def test_layers_kept_the_other_way_round_merge_too(tmp_path):
    tiny_gpt2(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed, label in enumerate("ab"):
        adapter(tmp_path / label, tmp_path / "base", seed, target_modules=["c_attn"], fan_in_fan_out=True)
    wanted = expected(tmp_path, "ab", [0.5, 0.5])
    report = merged(tmp_path, tmp_path / "run", "ab", "merger=soup")
    close(load_file(report.model_dir / "model.safetensors"), wanted)
    report = merged(tmp_path, tmp_path / "other", "ab", "merger=soup", "result=adapter")
    close(whole(tmp_path / "base", report.model_dir), wanted)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("targets", [["c_proj", "lm_head"], ["lm_head", "c_attn", "attn.c_proj"]], ids=str)
def test_of_layers_kept_both_ways_each_is_merged_as_its_base_has_it(tmp_path, targets, flag):
    """peft#3531: PEFT writes one `fan_in_fan_out` for all; a square weight fits the wrong way round too."""
    tiny_gpt2(vocab_size=len(tiny_tokenizer()), tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed, label in enumerate("ab"):
        adapter(tmp_path / label, tmp_path / "base", seed, target_modules=targets)
        config = json.loads((tmp_path / label / "adapter_config.json").read_text())
        (tmp_path / label / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": flag}))
    wanted = expected(tmp_path, "ab", [0.5, 0.5])
    report = merged(tmp_path, tmp_path / "run", "ab", "merger=soup")
    close(load_file(report.model_dir / "model.safetensors"), wanted)
    report = merged(tmp_path, tmp_path / "other", "ab", "merger=soup", "result=adapter")
    close(whole(tmp_path / "base", report.model_dir), wanted)


def test_a_run_of_luthier_is_a_model_too(adapters, tmp_path):
    from helpers import write_rows
    from luthier import train

    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    )
    for label in "xy":
        train(compose("train", [
            f"model.path={adapters / 'base'}", "model.dtype=float32", "model.device=cpu", "data=jsonl",
            f"data.path={tmp_path / 'rows.jsonl'}", "adapter=lora", "optimiser.lr=1e-2", "max_steps=2",
            "tracker=[]", f"seed={ord(label)}", f"run_dir={tmp_path / label}",
        ]))  # fmt: skip
    report = merged(tmp_path, tmp_path / "run", "xy", "merger=soup", "result=adapter")
    base = AutoModelForCausalLM.from_pretrained(adapters / "base").state_dict()
    both = [whole(adapters / "base", tmp_path / label / "model") for label in "xy"]
    found = whole(adapters / "base", report.model_dir)
    for name, one in base.items():
        torch.testing.assert_close(found[name], (both[0][name] + both[1][name]) / 2, rtol=0, atol=1e-5)
        if "q_proj" in name:
            assert not torch.equal(found[name], one)
    assert (report.model_dir / "tokenizer.json").is_file()


def test_what_peft_saves_beside_an_adapter_of_the_output_head_is_the_bases(adapters, tmp_path):
    """PEFT puts the base's weight into the folder; another one there would be lost."""
    for seed, label in enumerate("ab"):
        adapter(tmp_path / label, adapters / "base", seed, target_modules=["lm_head"])
        file = tmp_path / label / "adapter_model.safetensors"
        head = load_file(adapters / "base" / "model.safetensors")["lm_head.weight"]
        beside = {"base_model.model.lm_head.base_layer.weight": head}
        save_file(load_file(file) | beside, file, metadata={"format": "pt"})
    wanted = expected(adapters, (tmp_path / "a", tmp_path / "b"), [0.5, 0.5])
    report = merged(tmp_path, tmp_path / "run", "ab", "merger=soup")
    close(load_file(report.model_dir / "model.safetensors"), wanted)
    save_file(load_file(file) | {name: one + 1 for name, one in beside.items()}, file)
    with pytest.raises(
        ModelError, match=r"models\.b: .*lm_head\.base_layer\.weight is not the base's weight"
    ):
        merged(tmp_path, tmp_path / "other", "ab", "merger=soup")


def test_adapters_of_other_bases_are_refused(adapters, tmp_path):
    save_tiny(tmp_path / "base", seed=5, hidden_size=64, intermediate_size=96)
    adapter(tmp_path / "z", tmp_path / "base", 1)
    paths = f"{{a: {adapters / 'a'}, z: {tmp_path / 'z'}}}"
    options = [f"models={paths}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(
        ModelError, match=r"models\.z is an adapter of .* and models\.a of .*: set result=model"
    ):
        merge(compose("merge", [*options, "merger=soup", "result=adapter"]))
    with pytest.raises(ConfigError, match="set base=MODEL"):
        merge(compose("merge", [*options, "merger=ties"]))


def test_the_layers_nobody_adapts_are_the_bases(adapters, tmp_path):
    report = merged(adapters, tmp_path / "run", LABELS, "merger=ties")
    base = load_file(adapters / "base" / "model.safetensors")
    found = load_file(report.model_dir / "model.safetensors")
    untouched = [name for name in base if not any(key in name for key in ("q_proj", "up_proj", "down_proj"))]
    assert untouched
    assert all(torch.equal(found[name], base[name]) for name in untouched)


_COUNTED = """
import sys
import luthier
from luthier_plugins.commands.merge.run import merging

look, there = merging.room_for, []
merging.room_for = lambda *given: there.extend(sys.modules) or look(*given)
luthier.merge(luthier.compose("merge", sys.argv[1:]))
print("transformers.modeling_utils" in there, len(sys.modules.keys() - set(there)))
"""


def test_what_merging_imports_is_in_memory_before_the_bound_is_looked_at(adapters, tmp_path):
    words = [f"models=[{adapters / 'a'},{adapters / 'b'}]", "merger=soup", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", _COUNTED, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, fresh = done.stdout.split()[-2:]
    assert loaded == "True"
    assert int(fresh) < 10  # small ones; it was 1,665
