"""Adapter folders that no program wrote: always one line that names what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import save_tiny, tiny_llama
from luthier import ModelError
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier_plugins.adapters.lora import LoRA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and a sound adapter on it."""
    root = tmp_path_factory.mktemp("adapters")
    save_tiny(root / "base")
    model, adapter = tiny_llama(), LoRA(rank=2)
    adapter.attach(model, torch.Generator().manual_seed(0))
    adapter.save(model, root / "sound", str(root / "base"))
    return root


def load(path):
    return load_model(ModelConfig(path=str(path), dtype="float32", device="cpu"), train_base=False)


def written(folder, tmp_path, text):
    """Return a copy of the sound adapter whose config is `text`."""
    shutil.copytree(folder / "sound", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    return tmp_path / "adapter"


MISSING = object()
VALUES = [
    ("r", MISSING, "r=None: expected a whole number"),
    ("r", "16", "r='16': expected a whole number"),
    ("r", 2.5, "r=2.5: expected a whole number"),
    ("r", True, "r=True: expected a whole number"),
    ("r", [2], r"r=\[2\]: expected a whole number"),
    ("r", 0, "rank=0"),
    ("r", -4, "rank=-4"),
    ("r", 3, "lora_A"),
    ("lora_alpha", MISSING, "lora_alpha=None: expected a number"),
    ("lora_alpha", "high", "lora_alpha='high': expected a number"),
    ("lora_alpha", {}, "lora_alpha={}: expected a number"),
    ("lora_alpha", 0, "alpha=0.0"),
    ("lora_dropout", "much", "lora_dropout='much': expected a number"),
    ("lora_dropout", 7, "dropout=7.0"),
    ("rank_pattern", ["q_proj"], r"rank_pattern=\['q_proj'\]: expected numbers by name"),
    ("rank_pattern", {"q_proj": "2"}, "q_proj='2': expected a whole number"),
    ("rank_pattern", {"(": 2}, "is no regular expression"),
    ("alpha_pattern", {"q_proj": None}, "q_proj=None: expected a number"),
    ("alpha_pattern", "q_proj", "alpha_pattern='q_proj': expected numbers by name"),
    ("peft_type", MISSING, "unknown PEFT kind"),
    ("peft_type", 3, "unknown PEFT kind"),
    ("peft_type", "LOAR", "unknown PEFT kind 'LOAR'"),
    ("base_model_name_or_path", MISSING, "names no base model"),
    ("base_model_name_or_path", 7, "names no base model"),
    ("base_model_name_or_path", ["base"], "names no base model"),
    ("base_model_name_or_path", "", "names no base model"),
    ("lora_alpha", 1e300, r"lora_alpha=1e\+300: expected a number"),
    ("modules_to_save", [1], r"modules_to_save=\[1\]; expected a list of names"),
    ("modules_to_save", "lm_head", "modules_to_save='lm_head'; expected a list of names"),
    ("modules_to_save", {"lm_head": 1}, "modules_to_save=.*expected a list of names"),
    ("target_parameters", [3], r"target_parameters=\[3\]; expected a list of names"),
    ("target_parameters", "mlp", "target_parameters='mlp'; expected a list of names"),
    ("layer_replication", [[0, 2]], "layer_replication"),
]


@pytest.mark.parametrize(("key", "value", "told"), VALUES)
def test_a_value_that_means_nothing_is_named(folder, tmp_path, key, value, told):
    config = json.loads((folder / "sound" / "adapter_config.json").read_text()) | {key: value}
    config = {name: own for name, own in config.items() if own is not MISSING}
    with pytest.raises(ModelError, match=told) as error:
        load(written(folder, tmp_path, json.dumps(config)))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "adapter") in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '["r"]', "3", '"lora"', "{", "\x00", "[" * 100_000, '{"r": NaN']
)
def test_a_config_that_is_no_table_is_named(folder, tmp_path, text):
    place = written(folder, tmp_path, text)
    for path in ({"path": str(place)}, {"path": str(folder / "base"), "adapter": str(place)}):
        with pytest.raises(ModelError, match="damaged") as error:
            load_model(ModelConfig(**path, dtype="float32", device="cpu"), train_base=False)
        assert "\n" not in str(error.value)
        assert str(place) in str(error.value)


def test_adapters_on_each_other_are_refused(folder, tmp_path):
    """On itself, and two on one another: only one can be loaded, and none would end."""
    config = json.loads((folder / "sound" / "adapter_config.json").read_text())
    for name, base in (("self", "self"), ("one", "other"), ("other", "one"), ("above", "sound")):
        shutil.copytree(folder / "sound", tmp_path / name)
        below = folder / base if base == "sound" else tmp_path / base
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": str(below)})
        )
    for name in ("self", "one", "above"):
        with pytest.raises(ModelError, match="is an adapter on another adapter") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensor: tensor.to(torch.int8),
        lambda tensor: tensor > 0,
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.fill_(float("nan")),
        lambda tensor: tensor.fill_(float("inf")),
    ],
    ids=["whole numbers", "truth values", "complex numbers", "nan", "inf"],
)
def test_weights_that_are_no_finite_numbers_are_refused(folder, tmp_path, damage):
    """A6 of adapters: peft takes them for weights."""
    shutil.copytree(folder / "sound", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: damage(tensors[name])}, file)
    with pytest.raises(ModelError, match=r"self_attn|mlp") as caught:
        load(tmp_path / "adapter")
    assert "is not of finite floating-point numbers" in str(caught.value)


@pytest.mark.parametrize("ids", [[1, 10**9], [1, 2**70]], ids=["memory", "integers"])
def test_tokens_beyond_all_vocabularies_are_refused(folder, tmp_path, ids):
    shutil.copytree(folder / "sound", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"trainable_token_indices": ids})
    )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
    save_file(load_file(file) | rows, file)
    with pytest.raises(ModelError, match=r"embed_tokens"):
        load(tmp_path / "adapter")
