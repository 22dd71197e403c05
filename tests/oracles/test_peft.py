"""LoRA against peft: the same tensors give the same forward and gradients, and folders go both ways."""

import copy
import json
import warnings

import pytest
import torch

from helpers import tiny_gpt2, tiny_llama
from luthier.adapters.linear_adapter import adapted_layers
from luthier.adapters.peft_folder import load_adapter
from luthier.errors import ModelError
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


def moved(model, seed=1):
    """Give every trained weight a value, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    return model


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
        ({"bias": "all"}, r"bias='all', which Luthier does not support"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which"),
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
