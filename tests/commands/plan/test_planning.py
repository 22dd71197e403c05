"""`plan`: the verb from end to end, what it shows and ranks, and prediction beside measurement in a run."""

import io
import json

import pytest
from rich.console import Console

from helpers import save_tiny, tiny_llama, write_rows
from luthier import ConfigError, ModelError, compose, train
from luthier.commands.cli import dispatch
from luthier.errors import LuthierError
from luthier_plugins.commands.plan import plan
from luthier_plugins.commands.plan.planning import device_type, row
from luthier_plugins.commands.plan.ranking import Choice
from luthier_plugins.commands.plan.table import duration, show

pytestmark = pytest.mark.slow

STRANGER = """
    import math
    from dataclasses import dataclass
    from typing import ClassVar
    import torch
    from torch import nn
    from luthier import Adapter, Loss, Objective, Optimiser, Quantiser, hookimpl, option

    @dataclass(frozen=True)
    class Biases(Adapter):
        '''A vector of its own for every output of every MLP.'''

        def attach(self, model, generator):
            model.requires_grad_(False)
            for layer in model.model.layers:
                layer.mlp.shift = nn.Parameter(torch.zeros(32, device=layer.mlp.down_proj.weight.device))
                layer.mlp.register_forward_hook(lambda mlp, inputs, output: output + mlp.shift)

        def save(self, model, folder, base):
            raise AssertionError("nothing is trained")

    @dataclass(frozen=True)
    class Ternary(Quantiser):
        '''Two bits a weight, queries left out.'''

        def load_options(self, model_config, dtype):
            raise AssertionError("nothing is loaded")

        def quantises(self, name):
            return not name.endswith("q_proj")

        def bits_per_weight(self):
            return 2.0

    @dataclass(frozen=True)
    class Big(Optimiser):
        '''A hundred bytes for every parameter.'''

        def build(self, parameters):
            raise AssertionError("nothing is trained")

        def state_bytes(self, name, shape):
            return 100.0 * math.prod(shape)

    @dataclass(frozen=True)
    class Judged(Objective):
        '''Two completions, a judge and a value, and a loss that cannot do without numbers.'''
        branch_names: ClassVar[tuple[str, ...]] = ("good", "bad")
        needs_reference: ClassVar[bool] = True
        holds: ClassVar[dict[str, str]] = {"judge": "copy", "value": "head"}

        def encode(self, row, codec):
            raise AssertionError("there are no rows")

        def loss(self, policy, pack):
            assert len(pack.trees[0].branches) == 2
            total = -policy.logprobs(pack).values.sum()
            return Loss(total if float(total) > 0 else -total, 1.0)

    @hookimpl
    def register_adapters(register):
        register("biases", Biases)

    @hookimpl
    def register_quantisers(register):
        register("ternary", Ternary)

    @hookimpl
    def register_optimisers(register):
        register("big", Big)

    @hookimpl
    def register_objectives(register):
        register("judged", Judged)
"""
SHAPE = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
RANKED = "luthier_plugins.commands.plan.planning.ranked"
LINEAR = 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
REST = 2 * 320 * 32 + 13 * 32  # embedding, head, norms


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a model's config and nothing else, which everything runs in."""
    base = tmp_path / "base"
    tiny_llama(**{key: value for key, value in SHAPE.items() if key != "model_type"}).config.save_pretrained(
        base
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unranked(toy, monkeypatch):
    """The same where the other combinations, most of the work, are not looked at."""
    monkeypatch.setattr(RANKED, lambda *_: ())
    return toy


def planned(*overrides):
    return plan(compose("plan", ["pack_tokens=64", "tflops=1", "model.dtype=float32", *overrides]))


def test_a_config_without_weights_is_enough(unranked, capsys):
    result = planned("model.path=base", "adapter=lora", "adapter.rank=4")
    assert result.parameters - result.trained == LINEAR + REST
    assert result.trained == 4 * 6 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    memory = result.memory
    assert memory.weights == pytest.approx(4 * (LINEAR + REST), rel=0.001)  # buffers besides
    assert memory.adapter == memory.gradients == 4 * result.trained
    assert memory.optimiser == 8 * result.trained
    assert memory.held == 0
    assert memory.activations > result.otherwise.activations > 0
    assert result.total == memory.total
    assert result.fits
    out = capsys.readouterr().out
    assert f"{result.parameters:,} parameters" in out
    assert all(word in out for word in ("base weights", "gradient checkpointing", "headroom"))


def test_a_shape_on_the_command_line_needs_no_model(unranked):
    shape = ",".join(f"{key}:{str(value).lower()}" for key, value in SHAPE.items())
    assert planned(f"model.shape={{{shape}}}", "adapter=full").trained == LINEAR + REST


def test_a_70b_is_trained_on_one_gpu_of_48_gb_in_4_bits(toy, monkeypatch):
    config = ["model=llama3_70b", "quantiser=nf4", "adapter=lora", "adapter.dropout=0", "model.device=cuda"]
    more = ["model.gradient_checkpointing=true", "memory_gb=48", "tflops=300"]
    with monkeypatch.context() as patch:
        patch.setattr(RANKED, lambda *_: ())
        result = plan(compose("plan", [*config, *more]))
    assert result.fits
    assert 45e9 < result.total < 48e9
    assert 4 * 4.127 / 8 * 70.5e9 / 4 < result.memory.weights < 40e9
    dense = plan(compose("plan", ["model=llama3_70b", "adapter=lora", *config[3:], *more]))
    assert not dense.fits
    assert dense.advice.startswith("quantiser=nf4")
    assert result.flops_per_token == pytest.approx(6 * 70.5e9, rel=0.05)  # forward twice, inputs' gradients
    assert result.seconds == pytest.approx(1e6 * result.flops_per_token / (300e12 * 0.5))


def test_methods_of_strangers_are_planned(strangers, toy, monkeypatch):
    kinds = ("adapter.biases", "quantiser.ternary", "optimiser.big", "objective.judged")
    strangers.install("toy-methods", dict.fromkeys(kinds, "toy_methods"), {"toy_methods.py": STRANGER})
    with strangers.in_catalogue():
        chosen = ["adapter=biases", "quantiser=ternary", "optimiser=big", "objective=judged"]
        result = planned("model.path=base", *chosen)
        queries = 6 * 32 * 32
        weights = 4 * (REST + queries) + (LINEAR - queries) * 2 / 8
        assert result.trained == 6 * 32
        assert result.memory.weights == pytest.approx(weights, rel=0.01)
        assert result.memory.adapter == 4 * 6 * 32
        assert result.memory.optimiser == 100 * 6 * 32
        # The reference is measured before training, so nobody holds it; the judge is a copy, the value a row.
        assert result.memory.held == pytest.approx(result.memory.weights + 4 * 32)
        names = {(one.quantiser, one.adapter, one.optimiser) for one in result.choices}
        assert ("ternary", "lora", "big") in names
        monkeypatch.setattr(RANKED, lambda *_: ())
        full = planned("model.path=base", "adapter=full", "objective=judged")
        assert full.memory.held == pytest.approx(full.memory.weights + 4 * 32)


def test_what_is_refused_is_not_ranked(toy):
    names = {(one.quantiser, one.adapter, one.optimiser) for one in planned("model.path=base").choices}
    assert {(None, "full", "galore"), ("nf4", "lora", "adamw"), (None, "lora", "adamw_8bit")} <= names
    assert not {one for one in names if one[0] and one[1] == "full"}
    assert not {one for one in names if one[2] == "galore" and one[1] != "full"}
    assert not {one for one in names if one[2].startswith("paged")}  # on a CPU
    there = planned("model.path=base", "model.device=cuda", "memory_gb=8").choices
    assert ("nf4", "lora", "paged_adamw") in {(one.quantiser, one.adapter, one.optimiser) for one in there}


def test_the_ranking_agrees_with_the_plan_and_has_what_fits_first(toy):
    result = planned("model.path=base", "quantiser=nf4", "adapter.rank=2", "memory_gb=1")
    mine = next(
        c for c in result.choices if (c.quantiser, c.adapter, c.optimiser) == ("nf4", "lora", "adamw")
    )
    assert (mine.total, mine.trained) == (pytest.approx(result.total), result.trained)
    assert mine.headroom == pytest.approx(1e9 - result.total)
    choices = [
        Choice(None, "big", "o", 100, 16.0, 50.0, -10.0),
        Choice(None, "small", "o", 10, 16.0, 20.0, 20.0),
        Choice("q", "middle", "o", 50, 4.0, 30.0, 10.0),
        Choice(None, "middle", "o", 50, 16.0, 35.0, 5.0),
    ]
    order = [(one.quantiser, one.adapter) for one in sorted(choices, key=lambda one: one.order)]
    assert order == [(None, "middle"), ("q", "middle"), (None, "small"), (None, "big")]


def test_a_reference_is_measured_before_training(unranked, capsys):
    plain = planned("model.path=base", "objective=orpo")
    assert plain.reference is None
    own = planned("model.path=base", "objective=dpo", "adapter.rank=1")  # a toy's base, and hardly more
    assert own.total == own.memory.total, "the pass keeps nothing, so training holds more"
    assert own.memory.weights < own.reference.memory < own.total
    # Of a frozen base: forward, the same again for the gradients of the inputs, and what is computed twice;
    # no more than a third would be all of training, where weights have gradients too.
    assert 1 / 3 < own.reference.flops_per_token / own.flops_per_token < 1 / 2
    assert "measured once before training" in capsys.readouterr().out


def test_another_model_is_beside_the_first_while_it_is_measured(unranked):
    large = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    large.config.save_pretrained("large")
    weights = sum(parameter.nbytes for parameter in large.parameters())
    given = ["model.path=base", "objective=dpo", "reference.model=large"]
    result = planned(*given)
    assert result.total == result.reference.memory > result.memory.total
    own = result.memory.baseline + result.memory.weights + result.memory.adapter
    assert weights < result.reference.memory - own < 1.1 * weights
    alone = planned("model.path=base", "objective=dpo").reference.flops_per_token
    assert result.reference.flops_per_token > 10 * alone
    between = (result.memory.total + result.total) / 2e9
    small = planned(*given, f"memory_gb={between}")
    assert not small.fits
    assert small.advice.startswith("a smaller reference.model makes it fit")


def test_the_plan_is_written_as_json(toy, monkeypatch):
    choice = Choice(None, "lora", "adamw", 10, 16.0, 20.0, 30.0)
    monkeypatch.setattr(RANKED, lambda *_: (choice,))
    result = planned("model.path=base", "json=plan.json", "memory_gb=2")
    found = json.loads((toy / "plan.json").read_text())
    assert found["memory"]["weights"] == result.memory.weights
    assert found["capacity"] == 2e9
    assert [(one["adapter"], one["headroom"]) for one in found["choices"]] == [("lora", 30.0)]
    with pytest.raises(ConfigError, match=r"json=no/plan.json cannot be written"):
        planned("model.path=base", "json=no/plan.json")


def test_advice_names_the_knob(toy, monkeypatch):
    sizes = {key: value * 8 for key, value in SHAPE.items() if key in ("hidden_size", "intermediate_size")}
    shape = ",".join(f"{key}:{str(value).lower()}" for key, value in {**SHAPE, **sizes}.items())
    base = [f"model.shape={{{shape}}}", "model.device=cuda", "tflops=1", "pack_tokens=4096", "adapter=lora"]
    free = plan(compose("plan", base))
    assert (free.capacity, free.fits) == (None, None)
    between = (free.otherwise.total + free.total) / 2e9
    # What they take does not depend on what there is.
    monkeypatch.setattr(RANKED, lambda *_: free.choices)
    told = {
        f"memory_gb={2 * free.total / 1e9}": "nothing needs to change",
        f"memory_gb={between}": "model.gradient_checkpointing=true makes it fit",
        f"memory_gb={free.otherwise.total / 1e9 - 0.01}": "a smaller pack_tokens",
        "memory_gb=0.4": "nothing that is installed",
    }
    for memory, words in told.items():
        assert plan(compose("plan", [*base, memory])).advice.startswith(words), memory


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        (["model=lama3_70b"], LuthierError, "unknown model 'lama3_70b': did you mean 'llama3_70b'"),
        (["model.path=base", "memory_gb=-1"], ConfigError, "memory_gb=-1.0 must be positive"),
        (["model.path=base", "efficiency=0"], ConfigError, "efficiency=0.0 must be positive"),
        (["model.path=base", "pack_tokens=-5"], ConfigError, "pack_tokens=-5 must be positive"),
        (["model.path=base", "model.device=mps"], ConfigError, "mps cannot be planned; expected auto, cpu"),
        (["model.path=null", "model.gguf_package=no_such"], ModelError, "no_such is not installed; pip"),
        (["model.path=nowhere/at/all"], ModelError, "is not there"),
        (["model.path=other"], ModelError, "Should have a `model_type` key"),
        (["model.path=bert"], ModelError, "no causal language model of model_type 't5'"),
        (["model.path=base", "adapter=full", "quantiser=nf4"], ConfigError, "cannot be combined"),
    ],
)
def test_a_mistake_is_one_line(toy, overrides, error, told):
    for name, config in (("other", "{}"), ("bert", '{"model_type": "t5"}')):
        (toy / name).mkdir()
        (toy / name / "config.json").write_text(config)
    with pytest.raises(error, match=told) as raised:
        planned(*overrides)
    assert "\n" not in str(raised.value)


def test_help_lists_presets_and_options(capsys):
    assert dispatch(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("llama3_70b", "memory_gb", "tflops", "options of train"))
    with pytest.raises(LuthierError, match="leave out -m"):
        dispatch(["plan", "-m", "model=llama3_8b"])


def test_small_parts(unranked):
    assert [branch.ids for branch in row(8, 2).branches] == [(0,) * 4, (0,) * 3]
    assert row(1, 0).tokens == 2
    assert [device_type(name) for name in ("cpu", "cuda:1")] == ["cpu", "cuda"]
    assert [duration(seconds) for seconds in (5, 600, 36000)] == ["5 s", "10 min", "10.0 h"]
    console = Console(file=io.StringIO(), width=70)
    show(planned("model.path=base", "model.device=cuda"), console)
    assert "memory_gb=GB says" in console.file.getvalue()


@pytest.fixture
def run(tmp_path):
    """Overrides of a short run in which activations count for something."""
    wide = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 4}
    save_tiny(tmp_path / "base", **wide)
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i} " * 20} for i in range(64)]
    write_rows(tmp_path / "rows.jsonl", rows)
    return [
        f"model.path={tmp_path}/base", "model.dtype=float32",
        "data=jsonl", f"data.path={tmp_path}/rows.jsonl", "max_steps=3",
        "tracker=[]", f"run_dir={tmp_path}/run",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "more", [["adapter=lora"], ["adapter=full"], ["pack_tokens=64", "model.gradient_checkpointing=true"]]
)
def test_a_run_tells_what_was_predicted_and_what_was_used(run, tmp_path, more):
    result = train(compose("train", [*run, *more]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["predicted_memory_mb"] == result.predicted_memory_mb
    assert summary["measured_memory_mb"] == result.measured_memory_mb
    assert result.predicted_memory_mb == pytest.approx(result.measured_memory_mb, rel=0.1)
    assert result.measured_memory_mb <= result.peak_memory_mb * 1.01


def test_what_cannot_be_planned_is_none_and_trains(run, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no shapes")

    monkeypatch.setattr("luthier_plugins.commands.plan.observer._planned", broken)
    caplog.set_level("INFO", logger="luthier")
    result = train(compose("train", run))
    assert result.steps == 3
    assert result.predicted_memory_mb is None
    assert result.measured_memory_mb > 0
    assert "memory is not predicted: RuntimeError: no shapes" in caplog.text


def test_a_resumed_runs_states_are_not_counted_twice(run, tmp_path):
    whole = train(compose("train", [*run, "adapter=full", "checkpoint.every=2"]))
    again = train(compose("train", [f"resume={tmp_path}/run", "max_steps=5"]))
    assert again.steps == 5
    assert again.predicted_memory_mb == pytest.approx(whole.predicted_memory_mb, rel=0.05)
