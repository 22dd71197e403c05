"""What peft saves beside LoRA on linear layers: read, trained on, saved, folded and merged as peft does."""

import tempfile
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import moved, tiny_gpt2, tiny_llama, tiny_tokenizer
from luthier import ModelError, compose
from luthier.adapters import adapter_off, fold, load_adapter
from luthier_plugins.adapters.dora.dora import DoRA
from luthier_plugins.adapters.lora import LoRA
from luthier_plugins.commands.merge import merge

peft = pytest.importorskip("peft")
READERS = {LoRA.peft_kind: LoRA, DoRA.peft_kind: DoRA}
IDS = torch.arange(300, 320).view(2, 10)


def llama(**options):
    return tiny_llama(attention_bias=True, **options)


def tied():
    return llama(tie_word_embeddings=True)


def grown(make):
    """The model that peft takes for one whose vocabulary was resized."""
    model, folder = make(), tempfile.mkdtemp()
    model.save_pretrained(folder)
    model.resize_token_embeddings(330)
    model.name_or_path = model.config._name_or_path = folder
    return model


CASES = {
    "all biases": (llama, {"bias": "all"}),
    "the layers' biases": (llama, {"bias": "lora_only"}),
    "biases beside DoRA": (llama, {"bias": "all", "use_dora": True}),
    "biases of Conv1D": (tiny_gpt2, {"bias": "all", "target_modules": ["c_attn"]}),
    "biases of Conv1D beside DoRA": (
        tiny_gpt2, {"bias": "all", "target_modules": ["c_attn"], "use_dora": True},
    ),
    "modules": (llama, {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "a tied embedding": (tied, {"modules_to_save": ["embed_tokens"]}),
    "a tied head": (tied, {"modules_to_save": ["lm_head"]}),
    "a module of several": (llama, {"modules_to_save": ["mlp"]}),
    "tokens": (llama, {"trainable_token_indices": [301, 305]}),
    "tokens of a tied embedding": (tied, {"trainable_token_indices": [301, 305]}),
    "tokens of the head": (llama, {"trainable_token_indices": {"embed_tokens": [301], "lm_head": [303, 2]}}),
    "other tokens of a tied head": (
        tied, {"trainable_token_indices": {"embed_tokens": [301, 5], "lm_head": [303]}},
    ),
    "tokens of a tied head alone": (tied, {"trainable_token_indices": {"lm_head": [303, 2]}}),
    "the same tokens of a tied head": (
        tied, {"trainable_token_indices": {"embed_tokens": [301, 305], "lm_head": [301, 305]}},
    ),
    "tokens beside DoRA": (tied, {"trainable_token_indices": [301], "use_dora": True}),
    "B3: a head beside the copy that peft saves": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "an embedding": (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "a tied embedding's LoRA": (tied, {"target_modules": ["q_proj", "embed_tokens"]}),
    "an embedding of another rank": (
        llama,
        {
            "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True,
            "rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"embed_tokens": 3},
        },
    ),
    "GPT-2's embedding": (tiny_gpt2, {"target_modules": ["wte", "c_attn"]}),
}  # fmt: skip
GROWN = {
    "grown": (llama, {}),
    "grown and tied": (tied, {}),
    "grown, whole": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "grown, by token": (tied, {"trainable_token_indices": list(range(320, 330))}),
    "grown, with LoRA": (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


@pytest.fixture(autouse=True)
def _peft_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def close(mine, other, tolerance=1e-5):
    assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("case", [*CASES, *GROWN])
def test_read_trained_on_saved_and_folded_it_is_pefts(case, tmp_path):
    make, options = (CASES | GROWN)[case]
    base = (lambda: grown(make)) if case in GROWN else make
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    )
    theirs = moved(peft.get_peft_model(base(), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    mine = make()
    adapter = load_adapter(mine, tmp_path / "theirs", READERS, trainable=True)
    close(logits(mine), logits(theirs))
    assert trained(mine) == trained(theirs)
    with adapter_off(mine):
        close(logits(mine)[..., :320], logits(make()))
    expected = logits(moved(mine, seed=2))
    assert (expected - logits(theirs)).abs().max() > 1e-2
    adapter.save(mine, tmp_path / "mine", "some/base")
    close(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "mine").eval()), expected)
    again = make()
    load_adapter(again, tmp_path / "mine", READERS, trainable=False)
    assert not trained(again)
    close(logits(again), expected)
    fold(again, torch.float32)
    again.save_pretrained(tmp_path / "folded")
    close(logits(type(again).from_pretrained(tmp_path / "folded")), expected)


@pytest.mark.parametrize(
    "case", ["all biases", "modules", "a tied head", "tokens", "an embedding", "grown, with LoRA"]
)
def test_merged_it_is_pefts(case, tmp_path):
    make, options = (CASES | GROWN)[case]
    make().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = (lambda: grown(make)) if case in GROWN else make
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    )
    theirs = moved(peft.get_peft_model(base(), config)).eval()
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "theirs")
    one = tmp_path / "theirs"
    merge(compose("merge", [f"models={{a: {one}, b: {one}}}", "merger=soup", f"run_dir={tmp_path}/run"]))
    close(logits(type(make()).from_pretrained(tmp_path / "run" / "model")), logits(theirs))


def test_several_changes_of_one_folder_go_together(tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], bias="all",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = moved(peft.get_peft_model(llama(), config)).eval()
    theirs.save_pretrained(tmp_path)
    mine = llama()
    load_adapter(mine, tmp_path, READERS, trainable=False)
    close(logits(mine), logits(theirs))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("base_model.model.lm_head.weight", r"lm_head.weight is \[320, 31\], expected \[320, 32\]"),
        ("base_model.model.model.norm.weight", r"model.norm.weight is \[31\], expected \[32\]"),
    ],
)
def test_other_shapes_are_refused(name, told, tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name][..., :31].clone()}, file)
    with pytest.raises(ModelError, match=told):
        load_adapter(llama(), tmp_path, READERS, trainable=False)


def test_layers_that_lost_their_tensors_are_told(tmp_path, caplog):
    """A6 of adapters: PEFT would put fresh ones there, which change nothing."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "query"], "task_type": "CAUSAL_LM"}
    moved(peft.get_peft_model(llama(), peft.LoraConfig(**options))).save_pretrained(tmp_path)
    load_adapter(llama(), tmp_path, READERS, trainable=False)
    assert not caplog.messages
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {name: t for name, t in load_file(file).items() if "layers.0" in name or "q_proj" in name}, file
    )
    load_adapter(llama(), tmp_path, READERS, trainable=False)
    (told,) = caplog.messages
    assert "1 modules of target_modules, such as model.layers.1.self_attn.v_proj, have no tensors" in told


@pytest.mark.parametrize(
    "options",
    [{"exclude_modules": ["v_proj"]}, {"layers_to_transform": [1]}, {"modules_to_save": ["q_proj"]}],
    ids=str,
)
def test_layers_that_peft_leaves_out_are_not_told(options, tmp_path, caplog):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    load_adapter(llama(), tmp_path, READERS, trainable=False)
    assert not caplog.messages
