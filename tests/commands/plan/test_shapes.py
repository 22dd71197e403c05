"""What a model is, from its shape alone: published counts, what trains, and the bytes of methods.md."""

from types import SimpleNamespace

import pytest
import torch

from luthier import ModelError, compose
from luthier_plugins.adapters.full import Full
from luthier_plugins.adapters.lora import LoRA
from luthier_plugins.commands.plan.memory import Counted
from luthier_plugins.commands.plan.shapes import Sampled, config_of, on_meta
from luthier_plugins.optimisers.adamw import AdamW
from luthier_plugins.quantisers.nf4 import NF4

pytestmark = pytest.mark.slow

PUBLISHED = {
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824, "mistral_7b": 7_248_023_552, "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512, "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360, "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264, "gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984,
    "phi3_mini": 3_821_079_552, "smollm2_360m": 361_821_120, "smollm2_1_7b": 1_711_376_384,
}  # fmt: skip


def preset(name):
    """The preset's model on the meta device, as a run composes it."""
    config = compose("train", [f"model={name}", "data=jsonl", "data.path=x"])
    return on_meta(config_of(config.model), torch.bfloat16)


def counted(name, adapter, quantiser=None, sampled=False):
    model = preset(name)
    return Counted.of(Sampled.of(model) if sampled else Sampled(model), adapter, quantiser)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_presets_shape_has_the_published_number_of_parameters(name):
    assert sum(parameter.numel() for parameter in preset(name).parameters()) == PUBLISHED[name]


def test_lora_of_rank_8_on_q_and_v_trains_what_its_authors_counted():
    found = counted("llama2_7b", LoRA(rank=8, targets=["q_proj", "v_proj"]))
    assert (found.trained, found.parameters) == (4_194_304, 6_742_609_920)
    assert (
        counted("llama2_7b", LoRA(rank=16, targets=["q_proj", "k_proj", "v_proj", "o_proj"])).trained
        == 16_777_216
    )


def test_lora_of_rank_16_on_one_matrix_of_4096():
    assert (
        counted("llama2_7b", LoRA(rank=16, targets=r"model\.layers\.3\.self_attn\.q_proj")).trained == 131_072
    )


def test_adams_moments_of_7b_are_four_times_its_bf16_weights():
    """14 GB of weights and 56 GB of fp32 moments, as the seed document has it, rounded."""
    found = counted("llama2_7b", Full())
    assert found.weights == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert found.states(AdamW()) == 8 * 6_738_415_616


def test_a_few_layers_stand_for_all_of_them():
    whole, few = (counted("gemma2_2b", LoRA(rank=4), NF4(), sampled) for sampled in (False, True))
    assert len(few.model.model.model.layers) < len(whole.model.model.model.layers)
    for name in ("parameters", "trained", "weights", "adapter", "gradients"):
        assert getattr(few, name) == getattr(whole, name), name
    assert few.states(AdamW()) == whole.states(AdamW())


def test_a_quantised_weight_takes_the_bits_its_class_says_and_the_head_stays():
    plain, packed = (counted("llama3_8b", LoRA(rank=4), one) for one in (None, NF4()))
    head = embedding = 128256 * 4096
    linear = 8_030_261_248 - head - embedding - 65 * 4096  # 65 norms
    saved = linear * (2 - NF4().bits_per_weight() / 8)
    assert plain.weights - packed.weights == pytest.approx(saved, rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"model_type": "lama"}, r"transformers knows no model_type 'lama'; did you mean 'llama'"),
        ({"hidden_size": 8}, "it lacks model_type"),
        ({"model_type": "llama", "hiden_size": 8}, "llama has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "llama", "vocab_size": 8, "hidden_size": 8}, "lacks num_hidden_layers"),
    ],
)
def test_a_shape_that_cannot_be_built_is_told_with_what_is_missing(shape, told):
    with pytest.raises(ModelError, match=told):
        config_of(SimpleNamespace(shape=shape))


def test_a_preset_that_is_planned_with_is_one_for_every_verb():
    for verb, more in (
        ("train", ["data=jsonl", "data.path=x"]),
        ("fold", ["model.adapter=x", "out=y"]),
        ("evaluate", ["data=jsonl", "data.path=x"]),
    ):
        assert compose(verb, ["model=llama3_8b", *more]).model.path == "meta-llama/Meta-Llama-3-8B"
