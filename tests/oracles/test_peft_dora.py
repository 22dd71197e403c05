"""DoRA against peft: the same tensors give the same forward and gradients, and folders go both ways."""

import warnings

import pytest
import torch
from torch import nn

from helpers import moved, tiny_gpt2, tiny_llama
from luthier.adapters.linear_adapter import adapted_layers, fold
from luthier.adapters.peft_folder import load_adapter
from luthier_plugins.adapters.dora.dora import DoRA
from luthier_plugins.adapters.lora import LoRA

peft = pytest.importorskip("peft")
READERS = {DoRA.peft_kind: DoRA, LoRA.peft_kind: LoRA}
IDS = torch.arange(3, 27).view(2, 12)


def biased_llama():
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(generator=torch.Generator().manual_seed(module.out_features))
    return model


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "biased": biased_llama}
CASES = {
    "llama all": ("llama", {"targets": "all-linear"}),
    "llama rsLoRA": ("llama", {"targets": ["q_proj", "down_proj"], "rank_stabilised": True}),
    "llama patterns": ("llama", {"targets": "all-linear", "rank_pattern": {"q_proj": 2}}),
    "llama bias": ("biased", {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "gpt2 conv1d": ("gpt2", {"targets": "all-linear"}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _peft_warns_of_conv1d():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ours(kind, **options):
    model = MODELS[kind]()
    adapter = DoRA(**{"rank": 4, "alpha": 6.0, "dropout": 0.0, **options})
    adapter.attach(model, torch.Generator().manual_seed(0))
    return moved(model), adapter


def theirs(kind, options):
    names = {"targets": "target_modules", "rank_stabilised": "use_rslora"}
    values = {names.get(key, key): value for key, value in options.items()}
    config = peft.LoraConfig(r=4, lora_alpha=6.0, use_dora=True, task_type="CAUSAL_LM", **values)
    return moved(peft.get_peft_model(MODELS[kind](), config), seed=2).eval()


def copy_over(model, reference):
    """Put our A, B and m into peft's model, and return the pairs (ours, peft's)."""
    modules = dict(reference.base_model.model.named_modules())
    pairs = []
    for name, layer in adapted_layers(model).items():
        for mine, other in (
            (layer.lora_A, modules[name].lora_A),
            (layer.lora_B, modules[name].lora_B),
            (layer.magnitude, modules[name].lora_magnitude_vector),
        ):
            other["default"].weight.data.copy_(mine.detach())
            pairs.append((mine, other["default"].weight))
    return pairs


def assert_close(mine, other, tolerance=1e-5):
    """Equal to `tolerance` of the largest value."""
    assert (mine - other).abs().max() <= tolerance * float(other.abs().max())


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def gradient_of_inputs(model):
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    return embedded.grad


@pytest.mark.parametrize("case", CASES)
def test_it_starts_with_pefts_magnitudes(case):
    kind, options = CASES[case]
    model = MODELS[kind]()
    DoRA(rank=4, dropout=0.0, targets=options["targets"]).attach(model, torch.Generator())
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=options["targets"], task_type="CAUSAL_LM")
    reference = peft.get_peft_model(MODELS[kind](), config)
    modules = dict(reference.base_model.model.named_modules())
    for name, layer in adapted_layers(model).items():
        assert_close(layer.magnitude, modules[name].lora_magnitude_vector["default"].weight, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_pefts(case):
    kind, options = CASES[case]
    model, _ = ours(kind, **options)
    reference = theirs(kind, options)
    pairs = copy_over(model, reference)
    assert len(pairs) == sum(parameter.requires_grad for parameter in reference.parameters())
    assert (logits(model) - logits(MODELS[kind]())).abs().max() > 1e-2
    assert_close(logits(model), logits(reference))
    assert_close(gradient_of_inputs(model), gradient_of_inputs(reference))
    for mine, other in pairs:
        assert mine.grad.abs().max() > 1e-5
        assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("case", CASES)
def test_folded_it_is_what_peft_merges(case):
    kind, options = CASES[case]
    model, _ = ours(kind, **options)
    reference = theirs(kind, options)
    copy_over(model, reference)
    names = list(adapted_layers(model))
    fold(model)
    merged = reference.merge_and_unload()
    for name in names:
        mine, other = model.get_submodule(name).weight, merged.get_submodule(name).weight
        assert (mine - MODELS[kind]().get_submodule(name).weight).abs().max() > 1e-2
        assert_close(mine, other)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save(case, tmp_path):
    kind, options = CASES[case]
    model, adapter = ours(kind, **options)
    adapter.save(model, tmp_path / "adapter", "some/base")
    reference = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter").eval()
    assert_close(logits(model), logits(reference))


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_saves(case, tmp_path):
    kind, options = CASES[case]
    reference = theirs(kind, options)
    reference.save_pretrained(tmp_path / "adapter")
    model = MODELS[kind]()
    adapter = load_adapter(model, tmp_path / "adapter", READERS, trainable=False)
    assert isinstance(adapter, DoRA)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_close(logits(model), logits(reference))
    adapter.save(model, tmp_path / "again", "some/base")
    again = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "again").eval()
    assert_close(logits(again), logits(reference))
