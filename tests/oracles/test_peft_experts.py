"""LoRA on stacked experts against peft's ``target_parameters``: the same tensors, function and gradients."""

import json
import logging
import warnings

import pytest
import torch

from luthier import ConfigError
from luthier.adapters import adapted_layers, load_adapter
from luthier.testing import tiny_moe
from luthier.testing.models import FAMILIES, quantised
from luthier_plugins.adapters.dora.dora import DoRA
from luthier_plugins.adapters.lora import LoRA

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 27).view(2, 12)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(autouse=True)
def _peft_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def moved(model):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    return model


def close(mine, other, tolerance=1e-5):
    assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "first", "second"])
def test_we_read_and_train_what_peft_saves(family, parameters, tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM"
    )
    theirs = moved(peft.get_peft_model(tiny_moe(family), config)).eval()
    theirs.save_pretrained(tmp_path)
    mine = tiny_moe(family)
    load_adapter(mine, tmp_path, {LoRA.peft_kind: LoRA}, trainable=True)
    losses = [model(IDS, labels=IDS).loss for model in (mine, theirs)]
    close(*losses)
    gradients = []
    for model, loss in zip((mine, theirs), losses, strict=True):
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    ours, others = ({tuple(g.shape): g for g in given} for given in gradients)
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert ours.keys() == others.keys()
    norms = [sum(float(g.norm()) for g in given) for given in gradients]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 1e-2


def test_experts_that_nothing_trains_are_named(caplog):
    """B2: one line, with what would train them; none where they train."""
    with caplog.at_level(logging.INFO, "luthier"):
        LoRA(rank=2).attach(tiny_moe("mixtral"), torch.Generator())
        assert [record.getMessage() for record in caplog.records] == [
            "experts that nothing trains: 4 stacks, such as model.layers.0.mlp.experts.gate_up_proj; "
            "adapter.target_parameters=[mlp.experts.down_proj,mlp.experts.gate_up_proj] with "
            "adapter.dropout=0 trains them"
        ]
        caplog.clear()
        LoRA(rank=2, dropout=0.0, target_parameters=EXPERTS).attach(tiny_moe("mixtral"), torch.Generator())
        assert not caplog.records


def test_what_peft_would_take_for_experts_is_no_module_besides(tmp_path):
    """A5, peft#3009: it is told to peft as parameters, and as those alone."""
    model, adapter, ends = tiny_moe("deepseek_v3"), LoRA(rank=2, dropout=0.0), ("gate", "up", "down")
    adapter.attach(model, torch.Generator())
    adapter.save(model, tmp_path / "lora", "some/base")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    taken = {name for name in adapted_layers(model) if name.endswith(tuple(f"{end}_proj" for end in ends))}
    assert len(taken) == 6
    assert set(config["target_parameters"]) == {f"{name}.weight" for name in taken}
    assert not taken & set(config["target_modules"])
    assert not {name.rpartition(".")[2] for name in taken} & set(config["target_modules"])


def test_of_dora_peft_is_warned_of(tmp_path, caplog):
    """A5, peft#3009: PEFT has no form for a DoRA whose layers it would take for experts."""
    model, adapter = tiny_moe("deepseek_v3"), DoRA(rank=2)
    adapter.attach(model, torch.Generator())
    adapter.save(model, tmp_path / "dora", "some/base")
    assert "peft may take 6 layers, such as model.layers.0.mlp.gate_proj, for experts" in caplog.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"target_parameters": ["experts.gate_up"]},
            r"'experts.gate_up' is the end of no parameter.*did you mean",
        ),
        (
            {"target_parameters": ["lm_head.weight"]},
            r"lm_head.weight is a linear layer's; name that in targets",
        ),
        ({"target_parameters": EXPERTS, "dropout": 0.1}, r"go with dropout=0"),
        ({"target_parameters": EXPERTS, "init": "pissa"}, r"go with dropout=0 and init=kaiming"),
    ],
)
def test_what_cannot_be_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        LoRA(**{"rank": 2, "dropout": 0.0, **options}).attach(tiny_moe("mixtral"), torch.Generator())


def test_layers_told_as_parameters_are_read_on_a_quantised_base(tmp_path):
    """B1: what a run on a quantised base saved can be used."""
    model, adapter = quantised(tiny_moe("deepseek_v3")), LoRA(rank=2, dropout=0.0)
    adapter.attach(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = moved(model)(IDS).logits
    adapter.save(model, tmp_path, "some/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    again = quantised(tiny_moe("deepseek_v3"))
    load_adapter(again, tmp_path, {"LORA": LoRA}, trainable=False)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
