"""Preference objectives against TRL: the loss of its trainers, and the gradient of every parameter, are ours.

TRL's own code tokenises the rows, pads the batch, runs policy and reference and computes the loss; Luthier
encodes the same rows and runs them as token trees, in one pack and in two.
"""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, ModelPolicy, Pack, Row
from luthier.engine.pooling import pooled
from luthier.policy.references import References, keys_of
from luthier.system.processes import Processes
from luthier_plugins.objectives.dpo import DPO
from luthier_plugins.objectives.ipo import IPO
from luthier_plugins.objectives.kto.kto import KTO
from luthier_plugins.objectives.orpo import ORPO
from luthier_plugins.objectives.simpo import SimPO

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")

SAME = 1e-5
PAIRS = [
    {"prompt": "What is 12 + 7?", "chosen": " The answer is 19.", "rejected": " No idea"},
    {"prompt": "one two", "chosen": " three", "rejected": " four five six seven"},
    {"prompt": "The capital of France is", "chosen": " Paris; the sum is 4.", "rejected": " Rome"},
]
LABELLED = [
    {"prompt": "What is 12 + 7?", "completion": " The answer is 19.", "label": True},
    {"prompt": "one two", "completion": " four", "label": False},
    {"prompt": "The capital of France is", "completion": " Paris", "label": True},
    {"prompt": "user", "completion": " assistant system", "label": True},
]


def tokenizer():
    """Return one that begins every text with a token, as TRL's ORPO and CPO always do."""
    made = tiny_tokenizer(add_bos=True)
    made.pad_token = made.eos_token
    return made


def moved():
    """Return a policy some way from its reference, `tiny_llama()`."""
    model, generator = tiny_llama(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def fluent():
    """Return what copies a policy that finds the chosen likely: odds and probabilities differ there."""
    model, codec = moved(), Codec(tokenizer())
    trees = [codec.pair(row["prompt"], row["chosen"], "") for row in PAIRS]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(7):
        for tree in trees:
            ids = torch.tensor([tree.prompt + tree.branches[0].ids])
            optimiser.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimiser.step()
    model.zero_grad()
    return functools.partial(copy.deepcopy, model)


@pytest.fixture
def trainer(tmp_path):
    """Return what builds TRL's trainer of a method, in fp32 on the CPU."""

    def build(method, rows, policy=moved, reference=tiny_llama, **options):
        home = trl if method in ("DPO", "KTO") else getattr(_experimental(), method.lower())
        config = getattr(home, f"{method}Config")(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=len(rows), report_to="none", **options,
        )  # fmt: skip
        models = {"ref_model": reference()} if home is trl else {}
        return getattr(home, f"{method}Trainer")(
            model=policy(), args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(), **models,
        )  # fmt: skip

    return build


def _experimental():
    import trl.experimental.cpo
    import trl.experimental.orpo

    return trl.experimental


def theirs(trainer, one_by_one=False):
    """Return TRL's loss of all rows in one batch, or its mean over batches of one, and the trained model."""
    rows = list(trainer.train_dataset)
    batches = [[row] for row in rows] if one_by_one else [rows]
    losses = [trainer.compute_loss(trainer.model, trainer.data_collator(batch)) for batch in batches]
    return backward(torch.stack(losses).mean()), trainer.model


def backward(loss):
    loss.backward()
    return loss.item()


def encoded(objective, rows):
    codec = Codec(tokenizer())
    return [objective.encode(Row(dict(row), f"row {number}"), codec) for number, row in enumerate(rows)]


def assert_same_tokens(trainer, trees, branches=("chosen", "rejected")):
    """TRL's rows are the trees: the ids of the prompt, and those of its completions."""
    for row, tree in zip(trainer.train_dataset, trees, strict=True):
        for name, branch in zip(branches, tree.branches, strict=True):
            if f"{name}_labels" in row:
                start = row[f"{name}_labels"].count(-100)
                ids = row[f"{name}_input_ids"][:start], row[f"{name}_input_ids"][start:]
            else:
                ids = row["prompt_ids"], row[f"{name}_ids"]
            assert ids == (list(tree.prompt), list(branch.ids))
            assert branch.scored is None


@torch.no_grad()
def references(trees, model):
    """Return what the frozen `model` gives to every branch."""
    sums = ModelPolicy(model).logprobs(Pack.of(trees)).sums().tolist()
    return References.of(dict(zip([key for tree in trees for key in keys_of(tree)], sums, strict=True)))


def ours(objective, parts, policy=moved, reference=tiny_llama):
    """Return the mean loss of a step that is cut into `parts`, its model with gradients, and all losses."""
    seen = ModelPolicy(policy())
    seen.references = references([tree for part in parts for tree in part], reference())
    known = pooled(seen, objective, parts, Processes())
    losses = [objective.loss(seen, Pack.of(part, pooled=known)) for part in parts]
    mean = sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)
    return backward(mean), seen.model, losses


def assert_same(mine, other):
    """Equal losses, and gradients a hundred-thousandth of their norm apart, parameter by parameter."""
    assert mine[0] == pytest.approx(other[0], rel=SAME)
    expected = {name: parameter.grad for name, parameter in other[1].named_parameters()}
    for name, parameter in mine[1].named_parameters():
        gradient = expected.pop(name)
        apart = (parameter.grad - gradient).norm() / gradient.norm()
        assert apart <= SAME, f"{name}: {float(apart):.1e} apart"  # NaN, and so a gradient of zeros, is not
    assert not expected


# What the objective is, the trainer that has it, its options there, and whether a batch is one pair.
PAIRED = {
    "dpo": (DPO(beta=0.3), "DPO", {"loss_type": ["sigmoid"], "beta": 0.3}, False),
    # TRL smooths labels in `aot` alone, which sorts a batch's log-ratios first: of one pair, nothing moves.
    "cdpo": (
        DPO(beta=0.3, label_smoothing=0.1), "DPO",
        {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.1}, True,
    ),
    "ipo": (IPO(beta=0.3), "DPO", {"loss_type": ["ipo"], "beta": 0.3}, False),
    "simpo": (
        SimPO(beta=2.0, gamma=0.7), "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7}, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRED)
def test_a_paired_loss_and_its_gradients_are_trls(case, trainer):
    objective, method, options, one_by_one = PAIRED[case]
    built, trees = trainer(method, PAIRS, **options), encoded(objective, PAIRS)
    assert_same_tokens(built, trees)
    expected = theirs(built, one_by_one)
    assert abs(expected[0] - math.log(2)) > 0.01
    for parts in ([trees], [trees[:1], trees[1:]]):
        assert_same(ours(objective, parts), expected)


def test_orpo_is_trls_of_one_pair_after_one_token(trainer):
    # TRL's likelihood is over the prompt as well, all but its first token, and a mean over a batch's tokens;
    # Luthier's is over the completion, and a mean over pairs.
    policy, rows = fluent(), [{**row, "prompt": ""} for row in PAIRS]
    built, trees = trainer("ORPO", rows, policy, beta=0.5), encoded(ORPO(beta=0.5), rows)
    assert [len(tree.prompt) for tree in trees] == [1, 1, 1]
    assert_same_tokens(built, trees)
    expected = theirs(built, one_by_one=True)
    for parts in ([trees], [trees[:1], trees[1:]]):
        assert_same(ours(ORPO(beta=0.5), parts, policy), expected)


def test_orpo_is_the_sum_of_trls_parts_after_any_prompt(trainer):
    policy = fluent()
    built, trees = trainer("ORPO", PAIRS, policy, beta=0.5), encoded(ORPO(beta=0.5), PAIRS)
    assert_same_tokens(built, trees)
    batch = built.data_collator(list(built.train_dataset))
    chosen, rejected = built.concatenated_forward(built.model, batch)[:2]  # means over completions
    assert chosen.max() > -math.log(2), "log(1 − p) has another formula there"
    ratio = built.odds_ratio_loss(chosen, rejected)[0]
    expected = backward(-chosen.mean() - ratio.mean()), built.model
    for parts in ([trees], [trees[:1], trees[1:]]):
        assert_same(ours(ORPO(beta=0.5), parts, policy), expected)


@pytest.mark.parametrize("clamped", [False, True])
def test_kto_its_divergence_and_its_gradients_are_trls(clamped, trainer):
    # With policy and reference exchanged, the divergence changes its sign: z is 0 in one of the cases.
    policy, reference = (moved, tiny_llama) if clamped else (tiny_llama, moved)
    models = {"policy": policy, "reference": reference}
    weights = {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.5}
    objective, built = KTO(**weights), trainer("KTO", LABELLED, **models, **weights)
    trees = encoded(objective, LABELLED)
    # TRL takes the completion of the row before; Luthier draws one (`complete`), which is not tested here.
    trees = [
        replace(tree, branches=(tree.branches[0], trees[number - 1].branches[0]))
        for number, tree in enumerate(trees)
    ]
    assert_same_tokens(built, trees, ("completion", "KL_completion"))
    expected = theirs(built)
    kl = built._metrics["eval"]["kl"][0]
    assert (kl == 0) is clamped
    for parts in ([trees], [trees[:1], trees[1:]]):
        mine = ours(objective, parts, **models)
        assert_same(mine, expected)
        total, rows = map(sum, zip(*(loss.metrics["kl"] for loss in mine[2]), strict=True))
        assert max(0.0, float(total) / rows) == pytest.approx(kl, rel=SAME)
