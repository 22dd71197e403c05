"""LoRA against peft: the same tensors give the same forward and gradients, and folders go both ways."""

import copy
import json
import warnings

import pytest
import torch

from helpers import moved, tiny_gpt2, tiny_llama
from luthier.adapters.linear_adapter import adapted_layers
from luthier.adapters.peft_folder import load_adapter
from luthier.errors import ConfigError, ModelError
from luthier_plugins.adapters.lora import LoRA

peft = pytest.importorskip("peft")
READERS = {LoRA.peft_kind: LoRA}
IDS = torch.arange(3, 27).view(2, 12)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
CASES = {
    "llama q v": ("llama", {"targets": ["q_proj", "v_proj"]}),
    "llama all": ("llama", {"targets": "all-linear"}),
    "llama regex": ("llama", {"targets": r".*layers\.1\..*(gate|down)_proj"}),
    "llama rsLoRA": ("llama", {"targets": ["o_proj"], "rank_stabilised": True}),
    "llama patterns": (
        "llama",
        {
            "targets": "all-linear",
            "rank_pattern": {"q_proj": 2, r"1\.mlp\..*": 3},
            "alpha_pattern": {"v_proj": 5.0},
        },
    ),
    "gpt2 conv1d": ("gpt2", {"targets": ["c_attn", "c_fc"]}),
    "gpt2 rsLoRA": ("gpt2", {"targets": "all-linear", "rank_stabilised": True}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """LAPACK on matrices this small only waits for a second thread."""
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
    adapter = LoRA(**{"rank": 4, "alpha": 6.0, "dropout": 0.0, **options})
    adapter.attach(model, torch.Generator().manual_seed(0))
    return moved(model), adapter


def theirs(kind, options, **more):
    names = {"targets": "target_modules", "rank_stabilised": "use_rslora"}
    values = {names.get(key, key): value for key, value in options.items()}
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6.0, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **values, **more}
    )
    return moved(peft.get_peft_model(MODELS[kind](), config), seed=2).eval()


def copy_over(model, reference):
    """Put our A and B into peft's model, and return the pairs (ours, peft's)."""
    modules = dict(reference.base_model.model.named_modules())
    pairs = []
    for name, layer in adapted_layers(model).items():
        for mine, other in ((layer.lora_A, modules[name].lora_A), (layer.lora_B, modules[name].lora_B)):
            other["default"].weight.data.copy_(mine.detach())
            pairs.append((mine, other["default"].weight))
    return pairs


def assert_close(mine, other, tolerance=1e-6):
    """Equal to `tolerance`, of the largest value where that is above 1: fp32 sums in another order."""
    assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_pefts(case):
    kind, options = CASES[case]
    model, _ = ours(kind, **options)
    reference = theirs(kind, options)
    pairs = copy_over(model, reference)
    assert len(pairs) == sum(parameter.requires_grad for parameter in reference.parameters())
    assert_close(logits(model), logits(reference))
    for one in (model, reference):
        one(IDS, labels=IDS).loss.backward()
    for mine, other in pairs:
        assert mine.grad.abs().max() > 1e-4
        assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_peft_loads_what_we_save(case, init, tmp_path):
    kind, options = CASES[case]
    model, adapter = ours(kind, init=init, **options)
    adapter.save(model, tmp_path / "adapter", "some/base")
    reference = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter").eval()
    assert (logits(model) - logits(MODELS[kind]())).abs().max() > 1e-2
    # PiSSA is a difference of two large updates.
    assert_close(logits(model), logits(reference), 1e-6 if init == "kaiming" else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_saves(case, tmp_path):
    kind, options = CASES[case]
    reference = theirs(kind, options)
    reference.save_pretrained(tmp_path / "adapter")
    model = MODELS[kind]()
    adapter = load_adapter(model, tmp_path / "adapter", READERS, trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_close(logits(model), logits(reference))
    # And once more through our own folder.
    adapter.save(model, tmp_path / "again", "some/base")
    again = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "again").eval()
    assert_close(logits(again), logits(reference))


def test_other_ways_of_choosing_targets_are_understood(tmp_path):
    options = {"targets": "all-linear", "exclude_modules": ["q_proj"], "layers_to_transform": None}
    reference = theirs("llama", options)
    reference.save_pretrained(tmp_path)
    model = tiny_llama()
    load_adapter(model, tmp_path, READERS, trainable=True)
    assert {p.shape for p in model.parameters() if p.requires_grad}
    assert not any("q_proj" in name for name in adapted_layers(model))
    assert_close(logits(model), logits(reference))


def test_pissa_starts_and_learns_as_pefts_does():
    reference = peft.get_peft_model(tiny_llama(), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["v_proj", "up_proj"], init_lora_weights="pissa"))  # fmt: skip
    model = tiny_llama()
    adapter = LoRA(rank=4, alpha=6.0, dropout=0.0, targets=["v_proj", "up_proj"], init="pissa")
    adapter.attach(model, torch.Generator().manual_seed(0))
    modules = dict(reference.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            a, b = modules[name].lora_A["default"].weight, modules[name].lora_B["default"].weight
            # Singular vectors are unique up to a sign, their product is unique.
            torch.testing.assert_close(layer.lora_B @ layer.lora_A, b @ a, atol=1e-5, rtol=1e-4)
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
            layer.start_A.copy_(a)
            layer.start_B.copy_(-b)
    for one in (model, reference):
        optimiser = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimiser.zero_grad()
            one(IDS, labels=IDS).loss.backward()
            optimiser.step()
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-2
    assert_close(logits(model), logits(reference), 1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, r"unknown PEFT kind 'LORA\+use_dora': .*known: LORA"),
        ({"peft_type": "IA3"}, r"unknown PEFT kind 'IA3'"),
        ({"ensure_weight_tying": True}, r"ensure_weight_tying=True, which Luthier does not support"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.weight is missing, which is in modules_to_save="),
        ({"trainable_token_indices": [3]}, r"no tensor ends in .token_adapter.trainable_tokens_delta"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication="),
        ({"some_new_option": 3}, r"some_new_option=3, which"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' means a changed base"),
        ({"r": 3}, r"lora_A.weight is \[4, 32\], expected \[3, 32\]"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, told, tmp_path):
    theirs("llama", {"targets": ["q_proj"]}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=told):
        load_adapter(tiny_llama(), tmp_path, READERS, trainable=False)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    theirs("gpt2", {"targets": ["c_attn"]}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="belongs to no module of LlamaForCausalLM"):
        load_adapter(tiny_llama(), tmp_path, READERS, trainable=False)


def test_pickled_adapters_are_refused(tmp_path):
    theirs("llama", {"targets": ["q_proj"]}).save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only adapter_model.bin, which can run code"):
        load_adapter(copy.deepcopy(tiny_llama()), tmp_path, READERS, trainable=False)


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {r"layers.0.self_attn.v_proj": 2.0, ".*_proj": 64.0}},
        {"rank_pattern": {r"layers.0.self_attn.v_proj": 2, ".*_proj": 6}},
        {"alpha_pattern": {"v_proj": 2.0, ".*": 64.0}, "rank_pattern": {"k_proj": 1, "[a-z]_proj": 2}},
    ],
    ids=["alpha", "rank", "both"],
)
@pytest.mark.parametrize("options", [{}, {"rank_stabilised": True}, {"init": "pissa"}], ids=str)
def test_of_patterns_that_overlap_what_was_trained_is_saved(patterns, options, tmp_path):
    """peft#2194: a file has its patterns in order of their letters, and the first one that fits counts."""
    model, adapter = ours("llama", **patterns, **options)
    adapter.save(model, tmp_path / "adapter", "some/base")
    reference = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    back = tiny_llama()
    load_adapter(back, tmp_path / "adapter", READERS, trainable=False)
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in reference.named_modules()
        if hasattr(module, "lora_A")
    }
    assert theirs.keys() == adapted_layers(model).keys()
    for name, layer in adapted_layers(model).items():
        assert theirs[name].scaling["default"] == pytest.approx(layer.scale)
        assert adapted_layers(back)[name].scale == pytest.approx(layer.scale)
        assert theirs[name].r["default"] == layer.factors()[0].shape[0]
    assert_close(logits(back), logits(model), 1e-5)
    assert_close(logits(reference), logits(model), 1e-5)


def test_names_that_end_alike_are_told_apart(tmp_path):
    """A layer's whole name may be the end of another's: PEFT looks at ends."""

    class Two(torch.nn.Module):
        config = {"model_type": "two"}
        prepare_inputs_for_generation = None  # which peft asks of a language model

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj, self.inner = torch.nn.Linear(8, 8), torch.nn.Module()
            self.inner.proj = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(x) + 2 * self.inner.proj(x)

    model, adapter = Two(), LoRA(rank=2, alpha=4.0, dropout=0.0, alpha_pattern={"^proj": 32.0})
    adapter.attach(model, torch.Generator().manual_seed(0))
    assert [layer.scale for layer in adapted_layers(moved(model)).values()] == [16.0, 2.0]
    adapter.save(model, tmp_path / "adapter", "some/base")
    reference = peft.PeftModel.from_pretrained(Two(), tmp_path / "adapter").eval()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert_close(reference.base_model.model(x).detach(), model(x).detach())


def test_ranks_above_the_shorter_side_are_read(tmp_path):
    """PiSSA of rank 12 on a layer of 32 → 16 is saved as a LoRA of rank 24; peft's may have any rank."""
    model, adapter = ours("llama", rank=12, init="pissa")
    adapter.save(model, tmp_path / "pissa", "some/base")
    reference = theirs("llama", {"targets": "all-linear"}, r=40)
    reference.save_pretrained(tmp_path / "peft")
    for folder, expected in (("pissa", logits(model)), ("peft", logits(reference))):
        back = tiny_llama()
        read = load_adapter(back, tmp_path / folder, READERS, trainable=False)
        assert_close(logits(back), expected, 1e-5)
        read.save(back, tmp_path / "again" / folder, "some/base")
        again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "again" / folder).eval()
        assert_close(logits(again), expected, 1e-5)


def test_layers_too_small_for_their_rank_are_left_out_and_named(tmp_path, caplog):
    """A gate of Qwen2-MoE has one output; peft trains an update of rank 4 there, which is a waste."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    def base():
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4,
            shared_expert_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        return Qwen2MoeForCausalLM(config).eval()

    model, adapter = base(), LoRA(rank=4, alpha=8.0, dropout=0.0)
    adapter.attach(model, torch.Generator().manual_seed(0))
    assert not any("shared_expert_gate" in name for name in adapted_layers(model))
    assert "without an adapter: model.layers.0.mlp.shared_expert_gate (32 × 1)" in caplog.text
    adapter.save(moved(model), tmp_path / "adapter", "some/base")
    reference = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert_close(logits(reference), logits(model), 1e-5)
    with pytest.raises(ConfigError, match=r"rank=4 is too much for \S+shared_expert_gate \(32 × 1\)"):
        LoRA(rank=4, targets=["shared_expert_gate"]).attach(base(), torch.Generator())
    with pytest.raises(ConfigError, match=r"rank=64 is too much for"):
        LoRA(rank=64).attach(base(), torch.Generator())
