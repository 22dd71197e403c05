"""Layers that a model derives from nn.Linear: linear ones are adapted, routers and the like are none."""

import pytest
import torch
import transformers as tf

from luthier import ConfigError
from luthier.adapters import adapted_layers
from luthier_plugins.adapters.lora import LoRA

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip


def llama4():
    own = {"head_dim": 8, "num_local_experts": 4, "moe_layers": [0], "intermediate_size_mlp": 48}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**SIZES, **own, pad_token_id=0))


def falcon():
    return tf.FalconForCausalLM(tf.FalconConfig(**{**SIZES, "alibi": False}))


@pytest.mark.parametrize(
    ("make", "adapted", "left_out"),
    [(llama4, "self_attn.q_proj", "feed_forward.router"), (falcon, "self_attention.dense", None)],
)
def test_all_linear_means_what_is_linear(make, adapted, left_out):
    model = make().eval()
    LoRA(rank=2, dropout=0.0, targets="all-linear").attach(model, torch.Generator().manual_seed(0))
    names = [".".join(name.split(".")[-2:]) for name in adapted_layers(model)]
    assert adapted in names
    assert left_out not in names
    model(torch.arange(3, 9)[None]).logits.sum().backward()


def test_a_router_cannot_be_a_target():
    with pytest.raises(ConfigError, match="target 'router' matches no linear layer"):
        LoRA(targets=["router"]).attach(llama4(), torch.Generator())
