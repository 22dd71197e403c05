"""Outcome reward models against TRL: the loss of its trainer and the gradient of every parameter are ours."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers import START, tiny_llama, tiny_tokenizer
from luthier import Codec, ModelPolicy, Pack, Row
from luthier.models.score_head import attach_head
from luthier_plugins.objectives.reward.reward import Reward
from luthier_toolkits.saving import save_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "What is 12 + 7?", "chosen": " The answer is 19.", "rejected": " No idea", "margin": 0.5},
    {"prompt": "one two", "chosen": " three", "rejected": " four five six seven", "margin": 0.0},
    {
        "prompt": "The capital of France is",
        "chosen": " Paris; the sum is 4.",
        "rejected": " Rome",
        "margin": 2.0,
    },
]


def tokenizer():
    made = tiny_tokenizer()
    made.pad_token = START  # another than the end, which is scored
    return made


@pytest.mark.parametrize("packs", [1, 3])
@pytest.mark.parametrize(("centre", "margins"), [(0.0, False), (0.3, True)])
def test_loss_and_gradients(tmp_path, packs, centre, margins):
    rows = [row if margins else {k: v for k, v in row.items() if k != "margin"} for row in ROWS]
    model = tiny_llama()
    attach_head(model, "sequence", torch.Generator().manual_seed(3))
    model.config.pad_token_id = tokenizer().pad_token_id
    save_model(model, tokenizer(), tmp_path / "model")
    config = trl.RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=3, center_rewards_coefficient=centre or None,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32),
        args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(),
    )  # fmt: skip
    found = list(trainer.train_dataset)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(found))
    theirs.backward()

    objective, codec = Reward(centre=centre), Codec(tokenizer())
    trees = [objective.encode(Row(row, f"row {place}"), codec) for place, row in enumerate(rows)]
    for row, tree in zip(found, trees, strict=True):
        sides = [[*tree.prompt, *branch.ids] for branch in tree.branches]
        names = ("chosen", "rejected") if "chosen_ids" in row else ("chosen_input_ids", "rejected_input_ids")
        assert [row[f"{name}_ids" if name in ("chosen", "rejected") else name] for name in names] == sides
    mine = copy.deepcopy(model)
    policy, total, weight = ModelPolicy(mine), 0.0, 0.0
    for part in [trees] if packs == 1 else [[tree] for tree in trees]:
        loss = objective.loss(policy, Pack.of(part))
        loss.total.backward()
        total, weight = total + loss.total.item(), weight + loss.weight
    assert weight == 3
    assert total / weight == pytest.approx(theirs.item(), rel=1e-5)
    theirs_by_name = {name.removeprefix("model."): p.grad for name, p in trainer.model.named_parameters()}
    ours_by_name = {name.removeprefix("model."): p.grad for name, p in mine.named_parameters()}
    compared = 0
    for name, gradient in ours_by_name.items():
        other = theirs_by_name.get({"score_head.weight": "score.weight"}.get(name, name))
        if gradient is not None:
            assert (gradient / weight - other).norm() <= 1e-5 * other.norm(), name
            compared += 1
    assert compared == len(theirs_by_name)
