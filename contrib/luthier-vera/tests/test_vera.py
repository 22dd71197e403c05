"""VeRA: Luthier's suite of adapters, peft as an independent implementation, and its options."""

import warnings

import pytest
import torch

from luthier import ConfigError, ModelError, load_adapter
from luthier.testing import AdapterSuite, tiny_gpt2, tiny_llama
from luthier_vera.vera import VeRA, VeRALinear

IDS = torch.arange(3, 27).view(2, 12)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


class TestVeRA(AdapterSuite):
    method = VeRA


class TestVeRAOfSomeLayers(AdapterSuite):
    method = VeRA
    options = {"rank": 7, "dropout": 0.2, "targets": r".*(q_proj|up_proj|c_fc)", "save_projection": False}


@pytest.fixture(autouse=True)
def _peft_warns_of_conv1d_and_of_pairs_that_are_not_saved():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(model):
    """Give every trained weight a value, as training would."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(number)))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_loads_what_we_save_and_its_gradients_are_ours(kind, saved, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapter = MODELS[kind](), VeRA(rank=5, projection_seed=3, save_projection=saved)
    adapter.attach(model, generator())
    adapter.save(moved(model), tmp_path / "adapter", "some/base")
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter", is_trainable=True).eval()
    assert (logits(model) - logits(MODELS[kind]())).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    for one in (model, theirs):
        one(IDS, labels=IDS).loss.backward()
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, VeRALinear):
            other = modules[name]
            torch.testing.assert_close(layer.vera_d.grad, other.vera_lambda_d["default"].grad)
            torch.testing.assert_close(layer.vera_b.grad, other.vera_lambda_b["default"].grad)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_we_load_what_peft_saves(kind, saved, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(
        r=6, target_modules="all-linear", projection_prng_key=9, save_projection=saved, task_type="CAUSAL_LM"
    )
    theirs = moved(peft.get_peft_model(MODELS[kind](), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind]()
    load_adapter(model, tmp_path, {"VERA": VeRA}, trainable=False)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


def test_one_pair_serves_all_layers_and_only_vectors_train():
    model = tiny_llama()
    VeRA(rank=4).attach(model, generator())
    layers = [module for module in model.modules() if isinstance(module, VeRALinear)]
    assert len(layers) == 14
    assert len({id(layer.shared) for layer in layers}) == 1
    assert layers[0].shared.A.shape == (4, 48)
    assert layers[0].shared.B.shape == (48, 4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # A layer: r and d_out. q, o: 32 each, k, v: 16 each, gate, up: 48 each, down: 32.
    assert trained == 2 * (7 * 4 + 2 * 32 + 2 * 16 + 2 * 48 + 32)


def test_a_pair_that_should_be_there_and_is_not_is_named():
    model = tiny_llama()
    adapter = VeRA(rank=4)
    adapter.attach(model, generator())
    with pytest.raises(ModelError, match=r"base_model\.vera_A is missing"):
        adapter.load_state(model, {})


@pytest.mark.parametrize("bad", [{"rank": 0}, {"dropout": 1.0}, {"d_initial": 0}])
def test_values_that_cannot_train_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        VeRA(**bad)
