"""Held-out numbers: perplexity of a token, answers in their order, partial credit is not right."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, DataSource, ModelPolicy, Row
from luthier.config.options import EvaluationConfig
from luthier.data.data import encode
from luthier.evaluation.evaluation import Evaluator, greedy
from luthier_plugins.objectives.sft import SFT

PROMPTS = ["a", "What is 12 + 7?", "user", "one two three", "2"]


def generate(policy, codec, prompts, settings):
    return [answer.said for answer in greedy(policy, codec, prompts, settings)]


@dataclass(frozen=True)
class Scored(DataSource):
    """Rows whose answers all get the same score."""

    score: float | None = None

    def rows(self) -> Iterator[Row]:
        for index, prompt in enumerate(PROMPTS):
            yield Row({"prompt": prompt, "completion": f" {index}"}, f"rows[{index}]")

    def verify(self, row: Row, answer: str) -> float | None:
        return self.score


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return ModelPolicy(tiny_llama(vocab_size=len(tokenizer))), Codec(tokenizer)


def evaluator(parts, source: DataSource, pack_tokens: int = 2048, **settings) -> Evaluator:
    policy, codec = parts
    held_out = encode(source, SFT(), codec, 64)
    return Evaluator(policy, SFT(), codec, source, held_out, EvaluationConfig(**settings), pack_tokens)


def test_the_loss_is_per_token_and_the_perplexity_its_exponential(parts):
    found = evaluator(parts, Scored()).report(3, answer=False)
    policy, _ = parts
    total, count = 0.0, 0
    for tree in evaluator(parts, Scored()).held_out.trees:
        ids = torch.tensor([tree.prompt + tree.branches[0].ids])
        with policy.native_attention(), torch.no_grad():
            logprobs = policy.model(ids).logits.log_softmax(-1)[0]
        for place in range(len(tree.prompt), ids.shape[1]):
            total, count = total - float(logprobs[place - 1, ids[0, place]]), count + 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (found.step, found.rows, found.accuracy, found.samples) == (3, len(PROMPTS), None, [])


def test_the_loss_does_not_depend_on_packing(parts):
    one, all_ = (evaluator(parts, Scored(), pack_tokens=n).report(0, answer=False).loss for n in (1, 4096))
    assert one == pytest.approx(all_, rel=1e-5)


def test_nothing_of_a_pack_outlives_it(parts, monkeypatch):
    # users.md row 38: an evaluation that keeps every logit until its end runs out of memory.
    kept, own = [], ModelPolicy.logprobs

    def watched(policy, pack):
        assert not [True for values in kept if values() is not None]
        found = own(policy, pack)
        kept.append(weakref.ref(found.values))
        return found

    monkeypatch.setattr(ModelPolicy, "logprobs", watched)
    evaluator(parts, Scored(), pack_tokens=1).report(0, answer=False)
    assert len(kept) == len(PROMPTS)


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batch(parts):
    policy, codec = parts
    prompts = [codec.prompt_ids(prompt) for prompt in PROMPTS]
    alone = generate(policy, codec, prompts, EvaluationConfig(max_new_tokens=5, batch_size=1))
    together = generate(policy, codec, prompts, EvaluationConfig(max_new_tokens=5, batch_size=3))
    assert alone == together
    assert len(set(alone)) > 1


def test_generation_leaves_the_policy_ready_for_packs(parts):
    policy, codec = parts
    before = evaluator(parts, Scored()).report(0, answer=False).loss
    generate(policy, codec, [codec.prompt_ids("a")], EvaluationConfig(max_new_tokens=2))
    assert evaluator(parts, Scored()).report(0, answer=False).loss == before


@pytest.mark.parametrize(("score", "accuracy"), [(1.0, 1.0), (0.99, 0.0), (0.0, 0.0), (None, None)])
def test_partial_credit_is_not_a_right_answer(parts, score, accuracy):
    report = evaluator(parts, Scored(score), max_new_tokens=1).report(0, answer=True)
    assert report.accuracy == accuracy
    assert [sample.origin for sample in report.samples] == [f"rows[{i}]" for i in range(len(PROMPTS))]


def test_answering_can_be_left_out(parts):
    assert evaluator(parts, Scored(1.0), generate=False).report(0, answer=True).samples == []


@pytest.mark.parametrize("own", [77, [77, 78], None])
def test_an_answer_ends_at_the_token_training_teaches_and_at_the_checkpoints_own(parts, monkeypatch, own):
    policy, codec = parts
    asked = {}

    def record(input_ids, **options):
        asked.update(options)
        return input_ids

    monkeypatch.setattr(policy.model, "generate", record)
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", own)
    monkeypatch.setattr(policy.model.generation_config, "repetition_penalty", 1.3)
    generate(policy, codec, [[5, 6, 7]], EvaluationConfig(max_new_tokens=500))
    ends = {codec.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    assert set(asked["eos_token_id"]) == ends
    assert asked["repetition_penalty"] == 1.0
    assert asked["max_new_tokens"] == 256 - 3
