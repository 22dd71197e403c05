"""Full fine-tuning: everything trains, and the result is a whole model that reads back exactly."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import tiny_gpt2, tiny_llama
from luthier import ConfigError, ModelError
from luthier_plugins.adapters.full import Full
from luthier_plugins.adapters.lora import LoRA

IDS = torch.arange(3, 15)[None]


def test_everything_trains():
    model = tiny_llama().requires_grad_(False)
    Full().attach(model, torch.Generator())
    assert Full.trains_base
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_with_an_adapter_is_refused():
    model = tiny_llama()
    LoRA(rank=2).attach(model, torch.Generator())
    with pytest.raises(ConfigError, match="carries an adapter already"):
        Full().attach(model, torch.Generator())


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_gpt2])
@pytest.mark.parametrize("save_dtype", ["auto", "bfloat16"])
def test_the_saved_model_is_the_trained_one(make, save_dtype, tmp_path):
    model = make()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    Full(save_dtype=save_dtype).save(model, tmp_path / "model", "base")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    wanted = torch.float32 if save_dtype == "auto" else torch.bfloat16
    assert saved.dtype == saved.config.dtype == wanted
    assert torch.equal(saved.get_input_embeddings().weight, model.get_input_embeddings().weight.to(wanted))
    assert model.dtype == torch.float32
    if save_dtype == "auto":
        assert torch.equal(saved(IDS).logits, model(IDS).logits)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"only transformers models .* not Linear"):
        Full().save(nn.Linear(2, 2), tmp_path, "base")


def test_it_goes_with_no_quantiser():
    assert "quantiser=*" in Full.refuses
