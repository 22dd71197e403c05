"""Families of models against transformers and peft: losses of packed trees, adapters folded and merged."""

import pytest
import torch
import transformers as tf

from helpers import plain_values, tiny_tokenizer
from luthier import Branch, ModelError, Pack, Tree, compose
from luthier.adapters import adapted_layers
from luthier.config import ModelConfig
from luthier.models import load_model
from luthier.policy import policy_of
from luthier_plugins.adapters.lora import LoRA
from luthier_plugins.commands.fold.folding import fold
from luthier_plugins.commands.merge.run.merging import merge

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
FAMILIES = {
    "gpt_neox": (tf.GPTNeoXConfig, {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}),
    "bloom": (tf.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300}),
    "mpt": (tf.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "max_seq_len": 64}),
    "falcon_new": (tf.FalconConfig, {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_parallel": (tf.FalconConfig, {**SIZES, "parallel_attn": True, "multi_query": True}),
    "opt": (
        tf.OPTConfig,
        {
            **SIZES,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "do_layer_norm_before": True,
        },
    ),
    "gptj": (
        tf.GPTJConfig,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 64, "rotary_dim": 4},
    ),
    "phi": (tf.PhiConfig, GROUPED),
    "starcoder2": (tf.Starcoder2Config, GROUPED),
    "olmo2": (tf.Olmo2Config, GROUPED),
    "glm4": (tf.Glm4Config, {**GROUPED, "head_dim": 8}),
    "mixtral": (tf.MixtralConfig, {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        tf.GptOssConfig,
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    """A model of random weights, spread so that every part of it matters."""
    cls, options = FAMILIES[request.param]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(cls(**options, **ENDS)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trees():
    drawn = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        Tree(tuple(drawn[:9]), (Branch(tuple(drawn[9:14])), Branch(tuple(drawn[14:16])))),
        Tree(tuple(drawn[16:20]), (Branch(tuple(drawn[20:33])),)),
        Tree(tuple(drawn[33:34]), (Branch(tuple(drawn[34:40])),)),
    ]


def moved(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.normal_(std=0.1, generator=generator)


@torch.no_grad()
def plain(model):
    return plain_values(model.eval(), trees())


def loaded(path):
    return load_model(ModelConfig(path=str(path), dtype="float32", device="cpu"), train_base=False)


def assert_five_digits(found, expected):
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_packed_trees_give_the_loss_of_one_sequence_at_a_time(base, fused):
    expected = plain(tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    policy = policy_of(loaded(base), fused=fused)
    with torch.no_grad():
        assert_five_digits(policy.logprobs(Pack.of(trees())).values, expected)


def test_an_adapter_trains_is_folded_and_merged_as_peft_has_it(base, tmp_path):
    ours = loaded(base)
    lora = LoRA(rank=2, alpha=4.0, dropout=0.0)
    lora.attach(ours.model, torch.Generator().manual_seed(0))
    moved(ours.model)
    lora.save(ours.model, tmp_path / "adapter", str(base))
    policy = policy_of(ours, fused=True)
    values = policy.logprobs(Pack.of(trees())).values
    values.sum().backward()
    gradients = {name: p.grad for name, p in ours.model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    theirs = peft.PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    expected = plain(theirs)
    assert_five_digits(values.detach(), expected)
    fold(compose("fold", [f"model.path={tmp_path}/adapter", f"out={tmp_path}/folded", "dtype=float32"]))
    assert_five_digits(plain(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "folded")), expected)
    merge(
        compose(
            "merge",
            [f"models=[{tmp_path}/adapter]", f"run_dir={tmp_path}/merged", "merger=soup", "dtype=float32"],
        )
    )
    assert_five_digits(
        plain(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model")), expected
    )


READERS = {
    "mamba": (
        tf.MambaConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 4},
    ),
    "jamba": (
        tf.JambaConfig,
        {**GROUPED, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
}


@pytest.mark.parametrize("family", READERS)
def test_an_adapter_on_a_layer_whose_weight_the_model_reads_is_refused_by_name(family, tmp_path):
    cls, options = READERS[family]
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(cls(**options, **ENDS)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    LoRA(rank=2).attach(ours.model, torch.Generator())
    with pytest.raises(
        ModelError, match=r"reads the weight of .*layers\.0\.\w+\.dt_proj itself, .*adapter.targets"
    ):
        policy_of(ours, fused=True)
    ours = loaded(tmp_path)
    LoRA(rank=2, targets=["in_proj"]).attach(ours.model, torch.Generator())
    moved(ours.model)
    expected = plain(ours.model)
    with torch.no_grad():
        assert_five_digits(policy_of(ours, fused=True).logprobs(Pack.of(trees())).values, expected)
