"""CPO: values by hand, the ranges of its options, TRL as an independent implementation, Luthier's suite."""

import math

import pytest
import torch

from luthier import Codec, ConfigError, ModelPolicy, Pack, Row
from luthier.testing import ObjectiveSuite, tiny_llama, tiny_tokenizer
from luthier_cpo.cpo import CPO
from luthier_toolkits.preference import Side


class TestCPO(ObjectiveSuite):
    method = CPO


class TestCPOWithoutLikelihood(ObjectiveSuite):
    method = CPO
    options = {"beta": 0.5, "nll_weight": 0.0}


def side(sums, lengths):
    return Side(torch.tensor(sums), torch.tensor(lengths), torch.zeros(len(sums)))


def test_its_losses_are_the_equations():
    chosen, rejected = side([-4.0, -6.0, -9.0], [4.0, 2.0, 3.0]), side([-14.0, -6.0, -3.0], [2.0, 3.0, 1.0])
    # β·h is 1, 0 and −0.6; chosen costs 1, 3 and 3 nats a token. Lengths do not touch the first term.
    preference = torch.tensor([math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(0.6))])
    likelihood = torch.tensor([1.0, 3.0, 3.0])
    for weight in (0.0, 1.0, 2.0):
        losses = CPO(beta=0.1, nll_weight=weight).pair_loss(chosen, rejected)
        torch.testing.assert_close(losses, preference + weight * likelihood)


def test_it_prefers_by_the_log_probability():
    torch.testing.assert_close(CPO(beta=0.5).reward(side([-4.0], [2.0])), torch.tensor([-2.0]))


@pytest.mark.parametrize(
    "bad", [{"beta": 0.0}, {"beta": -1.0}, {"nll_weight": -0.1}, {"nll_weight": math.inf}]
)
def test_values_that_cannot_train_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CPO(**bad)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_its_loss_and_gradients_are_trls(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    monkeypatch.setenv("CI", "1")  # TRL then reports nothing home
    # TRL begins every prompt with that token, and means the likelihood over all tokens of a batch: one pair.
    tokenizer, rows = tiny_tokenizer(add_bos=True), list(CPO.example_rows[2:])
    tokenizer.pad_token = tokenizer.eos_token
    config = CPOConfig(
        output_dir=str(tmp_path), beta=0.3, cpo_alpha=0.5, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none",
    )  # fmt: skip
    trainer = CPOTrainer(
        tiny_llama(), config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    (row,) = trainer.train_dataset
    expected = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
    expected.backward()

    objective, policy = CPO(beta=0.3, nll_weight=0.5), ModelPolicy(tiny_llama())
    tree = objective.encode(Row(dict(rows[0]), "row"), Codec(tokenizer))
    chosen, rejected = (list(tree.prompt + branch.ids) for branch in tree.branches)
    assert (row["chosen_input_ids"], row["rejected_input_ids"]) == (chosen, rejected)
    loss = objective.loss(policy, Pack.of([tree]))
    loss.total.backward()
    torch.testing.assert_close(loss.total, expected, atol=0, rtol=1e-5)
    for (name, mine), other in zip(policy.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert (mine.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), name
