"""The conformance kit catches wrong methods: each broken one fails the check that names its fault."""

import math
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from luthier import (
    Adapter,
    DataSource,
    Loss,
    Merger,
    Optimiser,
    Quantiser,
    RewardModel,
    Row,
    RowFilter,
    Tracker,
    Tree,
    hookimpl,
    option,
    testing,
)
from luthier.testing.optimiser import strangers
from luthier_plugins.adapters.full import Full
from luthier_plugins.adapters.lora import LoRA, LoRALinear
from luthier_plugins.objectives.sft import SFT
from luthier_plugins.optimisers.adamw import AdamW


def faults(suite, cls, check, *arguments, **options):
    """Return what the check says of the method, or an empty string if it has nothing to say."""
    made = type("Tried", (suite,), {"method": cls, "options": options})()
    try:
        getattr(made, check)(*arguments)
    except AssertionError as error:
        return str(error)
    except pytest.fail.Exception as error:
        return str(error)
    return ""


# --- adapters: LoRA with one fault each


def lora(layer, **changes):
    """LoRA whose layers are of the class `layer`."""

    def wrap(self, name, base, generator):
        made = layer(base, *self.rank_and_scale(name, base), self.dropout)
        made.start_kaiming(generator)
        return made

    return dataclass(frozen=True)(type("Broken", (LoRA,), {"wrap": wrap, "__doc__": "Broken.", **changes}))


class StartsElsewhere(LoRALinear):
    def start_kaiming(self, generator):
        super().start_kaiming(generator)
        nn.init.constant_(self.lora_B, 0.1)


class DrawsGlobally(LoRALinear):
    def start_kaiming(self, generator):
        nn.init.normal_(self.lora_A)


class Idle(LoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gate = nn.Parameter(torch.ones(1))

    def adapted(self, x):
        return super().adapted(x) + 0 * self.gate


class FoldsTwice(LoRALinear):
    def merged_weight(self):
        return 2 * super().merged_weight() - self.base_weight()


class NeverOff(LoRALinear):
    def forward(self, x):
        return self.adapted(x)


class ReadsTheWeight(LoRALinear):
    def adapted(self, x):
        weight = self.base.weight if hasattr(self.base, "nx") else self.base.weight.T
        return x @ weight.to(x.dtype) + (self.base.bias if self.base.bias is not None else 0)


class Half(LoRALinear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.to(torch.bfloat16)


class Forgets(LoRALinear):
    """It learns a number that no checkpoint holds."""

    count = 0.0

    def adapted(self, x):
        if self.training:
            self.count += 0.01
        return super().adapted(x) + self.count


class WritesIntoTheBase(LoRALinear):
    def adapted(self, x):
        if self.training:
            with torch.no_grad():
                self.base.weight.mul_(0.999)
        return super().adapted(x)


class SavesWrong(LoRALinear):
    def adapter_state(self):
        return {name: 2 * tensor for name, tensor in super().adapter_state().items()}


def trains_the_base(self, model, generator):
    LoRA.attach(self, model, generator)
    model.lm_head.requires_grad_(True)


def attaches_twice(self, model, generator):
    if not hasattr(model, "seen"):
        LoRA.attach(self, model, generator)
    model.seen = True


@dataclass(frozen=True)
class HalfFull(Full):
    """Freezes the norms."""

    def attach(self, model, generator):
        super().attach(model, generator)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name and "ln" not in name)


@pytest.mark.parametrize(
    ("cls", "check", "arguments", "told"),
    [
        (lora(StartsElsewhere), "test_it_starts_as_the_base", ("llama",), "start the update at zero"),
        (lora(DrawsGlobally), "test_the_generator_alone_decides_its_start", (), "draw from `generator`"),
        (lora(Idle), "test_every_trained_tensor_moves_and_the_base_stays", ("llama",), "did not move"),
        (lora(WritesIntoTheBase), "test_every_trained_tensor_moves_and_the_base_stays", ("gpt2",),
         "is frozen but"),
        (lora(FoldsTwice), "test_folded_it_is_the_same_function", ("gpt2",), "mend merged_weight"),
        (lora(NeverOff), "test_switched_off_it_is_the_base", ("llama",), "enabled = False"),
        (lora(Half), "test_half_precision_computes_in_it_and_trains_in_fp32", (), "not float32"),
        (lora(Forgets), "test_a_checkpoint_brings_it_back", (), "persistent buffer"),
        (lora(LoRALinear, attach=trains_the_base), "test_exactly_what_trains_requires_a_gradient", ("llama",),
         "belong to the base"),
        (lora(LoRALinear, attach=attaches_twice), "test_a_second_adapter_is_refused", (), "refuse_adapted"),
        (HalfFull, "test_exactly_what_trains_requires_a_gradient", ("gpt2",), "stay frozen"),
    ],
)  # fmt: skip
def test_a_broken_adapter_is_caught(cls, check, arguments, told):
    assert told in faults(testing.AdapterSuite, cls, check, *arguments, **_dropless(cls))
    assert faults(testing.AdapterSuite, LoRA, check, *arguments) == ""


def _dropless(cls):
    return {"dropout": 0.0} if issubclass(cls, LoRA) else {}


def test_an_adapter_that_saves_something_else_is_caught(tmp_path):
    check = "test_saved_and_loaded_it_is_the_same_function"
    assert "read back, the logits are" in faults(
        testing.AdapterSuite, lora(SavesWrong), check, "llama", tmp_path
    )


def test_an_adapter_that_reads_a_quantised_weight_is_caught():
    with pytest.raises(RuntimeError):
        faults(testing.AdapterSuite, lora(ReadsTheWeight), "test_it_works_on_a_quantised_base")


def test_options_without_help_are_caught():
    @dataclass(frozen=True)
    class Silent(LoRA):
        """LoRA with an option nobody explains."""

        extra: int = 3

    check = "test_it_is_a_frozen_dataclass_that_describes_itself"
    assert "Silent.extra needs help" in faults(testing.AdapterSuite, Silent, check)


# --- optimisers: plain descent with one fault each


class Descent(torch.optim.Optimizer):
    """W ← W − lr·(m ← 0.5·m + g), with everything a fault can replace."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.mul_(0.5).add_(p.grad)
                    p.add_(self.update(p, m), alpha=-group["lr"])

    def update(self, p, m):
        return m


class Ascent(Descent):
    def update(self, p, m):
        return -m


class MatricesOnly(Descent):
    def update(self, p, m):
        return m if p.ndim > 1 else torch.zeros_like(m)


class CountsOutside(Descent):
    def update(self, p, m):
        return m * self.count


class KeepsADeque(Descent):
    def update(self, p, m):
        self.state[p]["history"] = deque([1.0])
        return m


class Noisy(Descent):
    def update(self, p, m):
        return m + 0.01 * torch.randn(m.shape)


class IgnoresTheSchedule(Descent):
    def step(self, closure=None):
        super().step()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.999)


class CountsNothing(Descent):
    skipped = 0


class MovesAtOnce(Descent):
    def announce(self, last, weight):
        self.step()

    def gradient_norm(self):
        return torch.zeros(())


class NeedsGradients(IgnoresTheSchedule):
    pass


def optimiser(made, state=4.0, parameters=list):
    @dataclass(frozen=True)
    class Tried(Optimiser):
        """Descent."""

        def build(self, named):
            return made([p for _, p in parameters(named)])

        def state_bytes(self, name, shape):
            return state * math.prod(shape)

    return Tried


def promising(made, **attributes):
    return type("Promising", (optimiser(made),), attributes)


@pytest.mark.parametrize(
    ("cls", "check", "told"),
    [
        (
            optimiser(Descent, parameters=lambda named: list(named)[1:]),
            "test_it_holds_every_parameter_once",
            "missing",
        ),
        (optimiser(Ascent), "test_it_comes_closer_to_the_minimum", "the update's sign"),
        (optimiser(MatricesOnly), "test_every_shape_moves", "layers.0.bias (24,) does not move"),
        (optimiser(CountsOutside), "test_resumed_it_is_the_run_that_was_never_interrupted", "after a resume"),
        (optimiser(KeepsADeque), "test_its_state_is_safe_to_load", "['history'] is a deque"),
        (optimiser(Noisy), "test_equal_runs_are_bit_identical", "seed a generator"),
        (optimiser(IgnoresTheSchedule), "test_the_schedule_decides_its_step", "moves at lr = 0"),
        (optimiser(NeedsGradients), "test_what_has_no_gradient_stays", "moves without a gradient"),
        (
            promising(Descent, skips_non_finite=True),
            "test_it_skips_what_is_not_finite_if_it_says_so",
            "promises an optimiser with `skipped`",
        ),
        (
            promising(CountsNothing, skips_non_finite=True),
            "test_it_skips_what_is_not_finite_if_it_says_so",
            "moves along a gradient that is not finite",
        ),
        (
            promising(Descent, steps_in_backward=True),
            "test_it_steps_in_the_backward_pass_if_it_says_so",
            "steps_in_backward is True, but",
        ),
        (optimiser(MovesAtOnce), "test_it_steps_in_the_backward_pass_if_it_says_so", "is False, but"),
        (
            promising(MovesAtOnce, steps_in_backward=True),
            "test_it_steps_in_the_backward_pass_if_it_says_so",
            "gradients are not freed",
        ),
        (optimiser(Descent, 16.0), "test_the_state_it_plans_for_is_the_state_it_has", "says 16.00"),
        (optimiser(Descent, 0.0), "test_the_state_it_plans_for_is_the_state_it_has", "says 0.00"),
    ],
)
def test_a_broken_optimiser_is_caught(cls, check, told):
    assert told in faults(testing.OptimiserSuite, cls, check)
    assert faults(testing.OptimiserSuite, optimiser(Descent), check) == ""
    assert faults(testing.OptimiserSuite, AdamW, check) == ""


def test_only_plain_values_are_safe():
    state = {"a": [torch.ones(1), 1, None, ("x", 2.0, True)], "b": {"c": {1}}}
    assert list(strangers(state, "s")) == ["s['b']['c'] is a set"]


# --- objectives: SFT with one fault each


class Mean(SFT):
    def loss(self, policy, pack):
        loss = super().loss(policy, pack)
        return Loss(loss.total / loss.weight, 1.0)


class Centred(SFT):
    """Compares a tree with the others of its pack."""

    def loss(self, policy, pack):
        sums = policy.logprobs(pack).sums()
        return Loss((sums - sums.mean()).square().sum() - sums.sum(), len(sums))


class Detached(SFT):
    def loss(self, policy, pack):
        loss = super().loss(policy, pack)
        return Loss(loss.total * loss.total.detach(), loss.weight**2)


class Unmasked(SFT):
    def loss(self, policy, pack):
        every = torch.arange(pack.tokens)
        return Loss(
            super().loss(policy, pack).total + policy.hidden(pack, every).square().sum(), 1.0 * pack.tokens
        )


class Drawn(SFT):
    def loss(self, policy, pack):
        loss = super().loss(policy, pack)
        return Loss(loss.total * (1 + 0.1 * torch.rand(())), loss.weight)


class Nameless(SFT):
    def encode(self, row, codec):
        if not row.fields.get("prompt"):
            return Tree((1, 2))
        return codec.pair(row.fields["prompt"], row.fields["completion"], "somewhere")


@pytest.mark.parametrize(
    ("cls", "check", "told"),
    [
        (Mean, "test_the_loss_is_a_sum_with_its_weight", "return sums, never means"),
        (Mean, "test_trees_weigh_what_the_loss_is_divided_by", "weight is 1.0, but `weigh` says 24.0"),
        (Centred, "test_packing_changes_nothing", "depends on packing"),
        (Detached, "test_its_gradient_is_the_slope_of_its_loss", "detached?"),
        (Unmasked, "test_tokens_that_are_not_scored_and_follow_change_nothing", "unscored tokens behind"),
        (Drawn, "test_equal_packs_have_equal_losses", "global generator"),
        (Nameless, "test_rows_become_trees", "the tree its row's origin"),
        (Nameless, "test_a_row_without_its_fields_is_refused_by_name", "without any of its fields"),
    ],
)
def test_a_broken_objective_is_caught(cls, check, told):
    assert told in faults(testing.ObjectiveSuite, cls, check)
    assert faults(testing.ObjectiveSuite, SFT, check) == ""


# --- the rest, by small methods with a switch for every fault


@dataclass(frozen=True)
class Rule(RewardModel):
    """Counts characters."""

    fault: str = option("", "Which.")

    def score(self, prompts, completions):
        scores = torch.tensor([float(len(c)) for c in completions])
        if self.fault == "batch" and len(scores):
            scores = scores - scores.mean()
        if self.fault == "order":
            scores = scores + torch.arange(len(scores))
        return (
            scores.double() if self.fault == "dtype" else scores[:, None] if self.fault == "shape" else scores
        )


@pytest.mark.parametrize(
    ("fault", "check", "told"),
    [
        ("shape", "test_it_scores_every_pair", "not (4,)"),
        ("dtype", "test_it_scores_every_pair", "not float32"),
        ("order", "test_the_order_of_the_pairs_is_theirs_alone", "in another order"),
        ("batch", "test_a_score_does_not_depend_on_its_batch", "alone, the scores"),
    ],
)
def test_a_broken_reward_model_is_caught(fault, check, told):
    assert told in faults(testing.RewardModelSuite, Rule, check, fault=fault)
    assert faults(testing.RewardModelSuite, Rule, check) == ""


@dataclass(frozen=True)
class Soup(Merger):
    """The mean."""

    fault: str = option("", "Which.")

    def merge(self, group):
        first = group.tensors[0]
        result = first + sum((one - first) / len(group.tensors) for one in group.tensors[1:])
        if self.fault == "order":
            result = 0.5 * result + 0.5 * first
        if self.fault == "writes":
            first.zero_()
        if self.fault == "draws":
            result = result + torch.rand(result.shape)
        if self.fault == "scales":
            result = 0.9 * result
        if self.fault == "whole":
            result = result + result.sum() - result.sum() / result.numel()
        return result.double() if self.fault == "dtype" else result

    def coefficients(self, labels):
        return [(1.0 if self.fault == "sum" else 1 / len(labels)) for _ in labels]


@dataclass(frozen=True)
class Arithmetic(Merger):
    """The base plus the sum of differences, or a fault."""

    needs_base = True
    least_inputs = 2
    fault: str = option("", "Which.")

    def merge(self, group):
        total = sum(group.deltas())
        return total if self.fault else group.base + total


@pytest.mark.parametrize(
    ("cls", "fault", "check", "told"),
    [
        (Soup, "dtype", "test_it_returns_float32_of_the_inputs_shape", "not float32"),
        (Soup, "writes", "test_its_inputs_stay_as_they_are", "wrote into its inputs"),
        (Soup, "scales", "test_one_model_is_itself", "from itself"),
        (Soup, "scales", "test_models_that_agree_stay_what_they_are", "all alike"),
        (Soup, "order", "test_the_order_of_the_models_is_without_effect", "symmetric = False"),
        (Soup, "whole", "test_pieces_are_without_effect", "elementwise = False"),
        (Soup, "draws", "test_shards_are_without_effect", "from `name`"),
        (Soup, "sum", "test_coefficients_are_what_is_merged", "coefficients say"),
        (Arithmetic, "no base", "test_models_that_agree_stay_what_they_are", "all alike"),
    ],
)
def test_a_broken_merger_is_caught(cls, fault, check, told):
    assert told in faults(testing.MergerSuite, cls, check, fault=fault)
    assert faults(testing.MergerSuite, cls, check) == ""


@dataclass(frozen=True)
class Counting(DataSource):
    """Three rows."""

    fault: str = option("", "Which.")

    def rows(self):
        for n in range(3):
            drawn = torch.rand(()).item() if self.fault == "draws" else 0
            yield Row({"n": n, "drawn": drawn}, "here" if self.fault == "origin" else f"row {n}")

    def verify(self, row, answer):
        return 7.0 if self.fault == "verdict" else None


@dataclass(frozen=True)
class Once(RowFilter):
    """Drops what it saw before."""

    fault: str = option("", "Which.")

    def keep(self, row):
        if self.fault == "reason" and not row.fields["prompt"]:
            return ""
        if self.fault == "writes":
            row.fields["prompt"] = "?"
        return Row(row.fields, "elsewhere") if self.fault == "origin" else row


@pytest.mark.parametrize(
    ("suite", "cls", "fault", "check", "told"),
    [
        (
            testing.DataSourceSuite,
            Counting,
            "origin",
            "test_rows_have_fields_and_an_origin",
            "share an origin",
        ),
        (
            testing.DataSourceSuite,
            Counting,
            "draws",
            "test_rows_come_in_the_same_order_every_time",
            "other rows",
        ),
        (
            testing.DataSourceSuite,
            Counting,
            "verdict",
            "test_a_verdict_is_a_share_or_unknown",
            "returned 7.0",
        ),
        (testing.RowFilterSuite, Once, "reason", "test_it_keeps_a_row_or_says_why_not", "is empty"),
        (testing.RowFilterSuite, Once, "writes", "test_a_kept_row_keeps_its_origin", "wrote into the row"),
        (testing.RowFilterSuite, Once, "origin", "test_a_kept_row_keeps_its_origin", "became elsewhere"),
    ],
)
def test_a_broken_source_or_filter_is_caught(suite, cls, fault, check, told):
    assert told in faults(suite, cls, check, fault=fault)
    assert faults(suite, cls, check) == ""


@dataclass(frozen=True)
class Deaf(Tracker):
    """Listens to nothing."""


@dataclass(frozen=True)
class Littering(Tracker):
    """Writes where it stands."""

    seen: list = field(default_factory=list, init=False, compare=False)

    @hookimpl
    def after_train(self, result):
        with open("log.txt", "w") as file:
            file.write("done")


@pytest.mark.parametrize(("cls", "told"), [(Deaf, "listens to nothing"), (Littering, "log.txt")])
def test_a_broken_tracker_is_caught(cls, told, tmp_path, monkeypatch):
    assert told in faults(testing.TrackerSuite, cls, "test_it_observes_a_run", tmp_path, monkeypatch)


@dataclass(frozen=True)
class Brief(Quantiser):
    """bf16, which it says takes 4 bits."""

    def load_options(self, model_config, dtype):
        model_config.vocab_size = 7
        return {"dtype": torch.bfloat16}

    def bits_per_weight(self):
        return 4.0


def test_a_broken_quantiser_is_caught(tmp_path):
    assert "changed the config" in faults(testing.QuantiserSuite, Brief, "test_it_gives_keyword_arguments")
    told = faults(testing.QuantiserSuite, Brief, "test_the_bits_it_plans_for_are_the_bits_it_takes", tmp_path)
    assert "bits_per_weight says 4.0, weights take 16.00" in told


def test_an_adapter_needs_no_linear_layer():
    """A kind's other shapes are skipped, not failed."""
    assert issubclass(Full, Adapter)
    with pytest.raises(pytest.skip.Exception):
        faults(testing.AdapterSuite, Full, "test_folded_it_is_the_same_function", "llama")
