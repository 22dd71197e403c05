"""One pass on shapes against the same pass on numbers: the bytes that live, and the work that is done."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import tiny_gpt2, tiny_llama
from luthier import Branch, ModelPolicy, Pack, Tree
from luthier.kernels.fused import fuse
from luthier.policy.row_blocks import LOGITS_BYTES
from luthier_plugins.adapters.full import Full
from luthier_plugins.adapters.lora import LoRA
from luthier_plugins.commands.plan.memory import passed
from luthier_plugins.commands.plan.shapes import Sampled, attach, on_meta, quantise
from luthier_plugins.commands.plan.simulation import LiveBytes, Pass, Setting, simulate
from luthier_plugins.commands.plan.time import flops_per_token
from luthier_plugins.objectives.sft import SFT
from luthier_plugins.quantisers.nf4 import NF4

pytestmark = pytest.mark.slow

TREES = [Tree((1,) * 40, (Branch((2,) * 270), Branch((3,) * 30))), Tree((4,) * 5, (Branch((5,) * 61),))]
"""Several tiles of attention, shared keys, and more scored tokens than a chunk of the head has."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 64 * 4 * 300)


def model_of(dtype=torch.float32, **changes):
    return tiny_llama(vocab_size=300, hidden_size=64, intermediate_size=160, **changes).to(dtype)


def measured(model, adapter, setting: Setting) -> Pass:
    """The same pass with numbers, on the CPU, by the same counter."""
    adapter.attach(model, torch.Generator().manual_seed(0))
    if setting.fused:
        fuse(model)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    policy = ModelPolicy(model, autocast_dtype=setting.autocast)
    pack = Pack.of(TREES)
    known = [*model.parameters(), *model.buffers(), pack.input_ids, pack.position_ids, pack.targets]
    for parameter in model.parameters():
        if parameter.requires_grad and setting.several:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
    with LiveBytes([*known, pack.positions]) as live:
        loss = SFT().loss(policy, pack).total
        kept = live.live
        loss.backward()
    return Pass(kept, live.peak)


def planned(model, adapter, setting: Setting) -> Pass:
    shapes = on_meta(model.config, setting.stored)
    attach(shapes, adapter)
    return simulate(shapes, TREES, SFT(), setting)


FP32 = Setting("cpu", torch.float32, None)
BF16 = Setting("cpu", torch.bfloat16, None)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("several", [False, True], ids=["one pack", "several packs"])
@pytest.mark.parametrize(
    ("adapter", "setting"),
    [
        (LoRA(rank=4), FP32),
        (LoRA(rank=4, dropout=0.0, targets=["q_proj", "v_proj"]), BF16),
        (Full(), FP32),
        (Full(), Setting("cpu", torch.float32, torch.bfloat16)),
    ],
    ids=["lora", "lora bf16, mlps fused", "full", "full autocast"],
)
def test_as_many_bytes_live_on_shapes_as_on_numbers(adapter, setting, several, checkpointing):
    setting = Setting(setting.device, setting.stored, setting.autocast, True, checkpointing, several)
    model = model_of(setting.stored)
    found, expected = planned(model, adapter, setting), measured(model, adapter, setting)
    assert found.kept == pytest.approx(expected.kept, rel=0.01)
    assert found.peak == pytest.approx(expected.peak, rel=0.01)


def test_dropout_in_the_attention_keeps_the_mask_of_every_tile():
    model = tiny_gpt2(vocab_size=300, n_positions=512)
    setting = Setting("cpu", torch.float32, None, several=False)
    found, expected = (of(model, LoRA(rank=4), setting) for of in (planned, measured))
    assert found.kept == pytest.approx(expected.kept, rel=0.01)
    assert found.peak == pytest.approx(expected.peak, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [LoRA(rank=4), Full()], ids=["lora", "full"])
def test_three_layers_say_what_eight_take(adapter, checkpointing):
    config = model_of(num_hidden_layers=8).config
    setting = Setting("cpu", torch.float32, None, checkpointing=checkpointing)
    model = on_meta(config, torch.float32)
    attach(model, adapter)
    found = passed(Sampled.of(model), TREES, SFT(), setting)
    expected = simulate(model, TREES, SFT(), setting)
    assert found.kept == pytest.approx(expected.kept, rel=1e-9)
    assert found.peak == pytest.approx(expected.peak, rel=1e-9)


def test_layers_that_differ_are_sampled_by_kind():
    model = on_meta(model_of(num_hidden_layers=9).config, torch.float32)
    attach(model, LoRA(rank=4, targets=r"model\.layers\.[0-4]\.self_attn\.q_proj"))
    sampled = Sampled.of(model)
    assert sampled.stands_for == (1, 1, 3, 1, 1, 2)
    found, expected = passed(sampled, TREES, SFT(), FP32), simulate(model, TREES, SFT(), FP32)
    assert found.kept == pytest.approx(expected.kept, rel=1e-9)


def test_a_quantised_base_has_one_dense_weight_at_a_time():
    plain, packed = (on_meta(model_of(num_hidden_layers=1).config, torch.float32) for _ in range(2))
    quantise(packed, NF4())
    few, peaks = [Tree((1,), (Branch((2,) * 7),))], []
    for model in (plain, packed):
        attach(model, LoRA(rank=4, dropout=0.0, targets=["down_proj"]))
        peaks.append(simulate(model, few, SFT(), FP32).peak)
    assert peaks[1] - peaks[0] == pytest.approx(4 * 64 * 160, rel=0.5)  # the largest weight


def test_a_gpus_attention_keeps_no_scores():
    tokens = [Tree((1,), (Branch((2,) * 999),))]
    peaks = {}
    for device in ("cpu", "cuda"):
        model = on_meta(model_of().config, torch.float32)
        attach(model, LoRA(rank=4, dropout=0.0, targets=["q_proj"]))
        setting = Setting(device, torch.float32, None)
        one = simulate(model, tokens, SFT(), setting)
        peaks[device] = one.peak - one.kept
    scores = 4 * 4 * 125 * 1000  # of one tile, fp32
    assert peaks["cpu"] > scores


def test_the_work_of_a_token_is_what_torch_counts_in_a_real_pass():
    tokens, model = 300, model_of(num_hidden_layers=5)
    shapes = on_meta(model.config, torch.float32)
    attach(shapes, Full())
    found = flops_per_token(Sampled.of(shapes), tokens, FP32)
    policy, pack = ModelPolicy(model.train()), Pack.of([Tree((1,), (Branch((2,) * (tokens - 1)),))])
    with FlopCounterMode(display=False) as count:
        SFT().loss(policy, pack).total.backward()
    assert found * tokens == pytest.approx(count.get_total_flops(), rel=0.01)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert found > 6 * linear  # forward, and two products backward, for every weight
