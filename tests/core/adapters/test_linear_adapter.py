"""Choosing layers, wrapping and unwrapping them, and folders that are written whole."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import tiny_gpt2, tiny_llama
from luthier import AdaptedLinear, ConfigError, LinearAdapter, ModelError
from luthier.adapters.linear_adapter import adapted_layers, adapter_off, copy_state, fold
from luthier.adapters.peft_folder import load_adapter
from luthier.adapters.targets import select, value_for
from luthier.contracts.adapter import Adapter
from luthier.errors import PluginError
from luthier.models import adapter_readers, saved_adapters
from luthier.registry.method_catalogue import catalogue
from luthier.system.files import written_whole

IDS = torch.arange(3, 27).view(2, 12)


class Shift(AdaptedLinear):
    """The simplest change there is: one vector times the sum of the inputs, ``W + v 1ᵀ``."""

    def __init__(self, base):
        super().__init__(base)
        self.shift = nn.Parameter(torch.zeros(self.out_features))

    def adapted(self, x):
        return self.base(x) + x.sum(-1, keepdim=True) * self.shift

    def merged_weight(self):
        return self.base_weight() + self.shift[:, None]

    def adapter_state(self):
        return {"shift": self.shift.detach()}

    def load_adapter_state(self, state):
        copy_state({"shift": self.shift}, state)


@dataclasses.dataclass(frozen=True)
class Shifts(LinearAdapter):
    peft_kind = "SHIFT"
    targets: object = "all-linear"

    def wrap(self, name, base, generator):
        return Shift(base)

    def peft_method(self):
        return {}

    @classmethod
    def from_peft(cls, config):
        return cls(targets=config["target_modules"])


class Packed(nn.Linear):
    """A quantised layer in miniature: what it stores is not what it computes with."""

    def forward(self, x):
        return nn.functional.linear(x, -3 * self.weight, self.bias)


def attached(model, **options):
    adapter = Shifts(**options)
    adapter.attach(model, torch.Generator())
    with torch.no_grad():
        for number, layer in enumerate(adapted_layers(model).values()):
            layer.shift.add_(0.01 * (number + 1))
    return model, adapter


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize(
    ("targets", "count", "sample"),
    [
        ("all-linear", 14, "model.layers.1.mlp.down_proj"),
        (["q_proj", "v_proj"], 4, "model.layers.0.self_attn.v_proj"),
        (("self_attn.q_proj",), 2, "model.layers.0.self_attn.q_proj"),
        (["model.layers.1.mlp.up_proj"], 1, "model.layers.1.mlp.up_proj"),
        (r".*\.1\..*_proj", 7, "model.layers.1.self_attn.o_proj"),
        (["lm_head"], 1, "lm_head"),
    ],
)
def test_targets_are_suffixes_a_regex_or_all(targets, count, sample):
    model = tiny_llama()
    names = select(model, targets)
    assert len(names) == count
    assert sample in names
    # In the model's order, whatever order they were named in.
    assert names == [name for name, _ in model.named_modules() if name in names]


def test_all_linear_of_gpt2_is_its_conv1d_layers():
    assert {name.rpartition(".")[2] for name in select(tiny_gpt2(), "all-linear")} == {
        "c_attn",
        "c_proj",
        "c_fc",
    }


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (
            ["q_proj", "v_porj"],
            r"target 'v_porj' matches no linear layer: did you mean 'v_proj'\? known: do",
        ),
        (["embed_tokens"], "target 'embed_tokens' matches no linear layer"),
        ("v_porj", r"target 'v_porj' matches no linear layer: did you mean 'v_proj'"),
        ("q_proj.*x", "fully matches no linear layer"),
        (5, "targets=5: expected names, a regular expression or all-linear"),
        ("(", r"targets='\(' is no regular expression"),
        ([], r"targets=\[\] chooses nothing"),
    ],
)
def test_targets_that_match_nothing_are_told(targets, told):
    with pytest.raises(ConfigError, match=told):
        select(tiny_llama(), targets)


def test_a_tied_head_is_refused():
    with pytest.raises(ConfigError, match="output head, which is tied to the embedding"):
        select(tiny_llama(tie_word_embeddings=True), ["lm_head"])


def test_a_model_without_linear_layers_is_told():
    with pytest.raises(ConfigError, match="Embedding has no linear layer"):
        select(nn.Embedding(3, 3), "all-linear")


def test_patterns_match_as_pefts_do():
    patterns = {"q_proj": 1, r"layers\.0\..*": 2}
    assert value_for(patterns, "model.layers.0.self_attn.q_proj", 9) == 1
    assert value_for(patterns, "model.layers.0.mlp.up_proj", 9) == 2
    assert value_for(patterns, "model.layers.1.mlp.up_proj", 9) == 9
    assert value_for({"proj": 1}, "model.q_proj", 9) == 9


def test_attaching_freezes_all_but_the_adapters_own():
    model, _ = attached(tiny_llama().train(), targets=["q_proj"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{number}.self_attn.q_proj.shift" for number in (0, 1)
    }
    assert all(layer.training for layer in adapted_layers(model).values())
    model, _ = attached(tiny_llama().eval())
    assert not any(module.training for module in model.modules())


def test_a_second_adapter_is_refused():
    model, adapter = attached(tiny_llama())
    with pytest.raises(ConfigError, match="carries an adapter already"):
        adapter.attach(model, torch.Generator())


def test_switched_off_it_is_the_base_and_comes_back_even_after_an_error():
    model, _ = attached(tiny_llama())
    on, base = logits(model), logits(tiny_llama())
    assert not torch.allclose(on, base)
    with adapter_off(model):
        assert torch.equal(logits(model), base)
        with adapter_off(model):
            pass
        assert torch.equal(logits(model), base)
    with pytest.raises(ZeroDivisionError), adapter_off(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_folding_gives_the_plain_model_of_the_same_function(make):
    model, _ = attached(make())
    before = logits(model)
    fold(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in make().modules()}
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_base_is_read_through_its_forward_and_folds_into_a_linear(bias):
    torch.manual_seed(0)
    layer = Shift(Packed(6, 4, bias=bias))
    nn.init.normal_(layer.shift)
    torch.testing.assert_close(layer.base_weight(), -3 * layer.base.weight)
    folded = layer.fold(torch.float32)
    x = torch.randn(5, 6)
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), layer(x), atol=1e-6, rtol=1e-5)


def test_folding_keeps_the_dtype_of_a_dense_base():
    layer = Shift(nn.Linear(6, 4).to(torch.bfloat16))
    assert layer.fold().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (r".*1\.mlp\.up_proj", ["model.layers.1.mlp.up_proj"]),
    ],
)
def test_saved_and_loaded_it_is_the_same(targets, written, tmp_path):
    model, adapter = attached(tiny_llama(), targets=targets)
    adapter.save(model, tmp_path / "new" / "adapter", "some/base")
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == written
    assert config["base_model_name_or_path"] == "some/base"
    assert config["peft_type"] == "SHIFT"
    again = tiny_llama()
    loaded = load_adapter(again, tmp_path / "new" / "adapter", {"SHIFT": Shifts}, trainable=True)
    assert isinstance(loaded, Adapter)
    assert torch.equal(logits(again), logits(model))
    assert all(layer.shift.requires_grad for layer in adapted_layers(again).values())


def test_conv1d_is_written_as_fan_in_fan_out(tmp_path):
    model, adapter = attached(tiny_gpt2())
    adapter.save(model, tmp_path, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.0.self_attn.q_proj.more", "q_proj: expected shift, found more, shift"),
        ("lm_head.other", "lm_head: expected shift, found other"),
        ("model.norm.shift", "target 'model.norm' matches no linear layer"),
        ("nowhere.shift", "'nowhere.shift' belongs to no module of LlamaForCausalLM"),
    ],
)
def test_folders_that_do_not_fit_are_told(name, told, tmp_path):
    model, adapter = attached(tiny_llama())
    adapter.save(model, tmp_path, "base")
    state = load_file(tmp_path / "adapter_model.safetensors")
    state[f"base_model.model.{name}"] = torch.zeros(1)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=told):
        load_adapter(tiny_llama(), tmp_path, {"SHIFT": Shifts}, trainable=False)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"), "is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is damaged"),
    ],
)
def test_incomplete_folders_are_told(break_it, told, tmp_path):
    model, adapter = attached(tiny_llama())
    adapter.save(model, tmp_path, "base")
    break_it(tmp_path)
    with pytest.raises(ModelError, match=told):
        load_adapter(tiny_llama(), tmp_path, {"SHIFT": Shifts}, trainable=False)


def test_the_catalogue_says_who_reads_which_folders():
    assert adapter_readers()["LORA"].__name__ == "LoRA"


def test_folders_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "folder"
    with written_whole(target) as fresh:
        (fresh / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(FileNotFoundError), written_whole(target) as fresh:
        (fresh / "missing" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    with written_whole(target) as fresh:
        (fresh / "b").write_text("3")
    assert [file.name for file in target.iterdir()] == ["b"]
    with written_whole(target, keep_existing=True) as fresh:
        (fresh / "c").write_text("4")
    assert [file.name for file in target.iterdir()] == ["b"]
    assert [folder.name for folder in target.parent.iterdir()] == ["folder"]


def test_two_adapters_that_read_one_kind_of_folder_are_refused(monkeypatch):
    lora = catalogue().find("adapter", "lora")
    other = dataclasses.replace(lora, name="other")
    monkeypatch.setattr(saved_adapters, "catalogue", lambda: SimpleNamespace(all=lambda: [lora, other]))
    with pytest.raises(PluginError, match=r"PEFT kind LORA is read by luthier .* and by luthier"):
        adapter_readers()
