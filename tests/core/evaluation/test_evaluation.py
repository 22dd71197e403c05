"""Held-out numbers: perplexity of a token, answers in their order, partial credit is not right."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import GenerationConfig

from helpers import tiny_llama, tiny_tokenizer
from luthier import Codec, DataSource, ModelPolicy, Row
from luthier.data.data import encode
from luthier.evaluation import EvaluationConfig
from luthier.evaluation.evaluation import Evaluator, greedy
from luthier.policy.generation import Decoding, answers
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
        asked.update(options, ends=set(policy.model.generation_config.eos_token_id))
        return input_ids

    monkeypatch.setattr(policy.model, "generate", record)
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", own)
    generate(policy, codec, [[5, 6, 7]], EvaluationConfig(max_new_tokens=500))
    ends = {codec.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    assert asked["ends"] == ends
    assert asked["max_new_tokens"] == 256 - 3


OF_A_CHECKPOINT = {
    "min_p": 0.9, "typical_p": 0.2, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "top_k": 1, "top_p": 0.1,
    "temperature": 9.0, "do_sample": True, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 2.0, "suppress_tokens": list(range(3, 60)), "begin_suppress_tokens": [5],
    "bad_words_ids": [[token] for token in range(60, 100)], "sequence_bias": [[[7], 50.0]],
    "forced_eos_token_id": 1, "forced_bos_token_id": 9, "min_new_tokens": 3, "min_length": 9,
    "exponential_decay_length_penalty": (1, 9.0), "renormalize_logits": True, "num_beams": 3,
    "num_return_sequences": 2, "length_penalty": 3.0, "early_stopping": True, "max_length": 4,
    "max_time": 0.0, "stop_strings": ["a"], "guidance_scale": 2.0, "use_cache": False,
    "return_dict_in_generate": True, "output_scores": True, "assistant_early_exit": 1,
    "prompt_lookup_num_tokens": 2, "penalty_alpha": 0.6,
}  # fmt: skip
"""Options of ``generation_config.json``, each with a value that changes answers or how they come."""


@pytest.mark.parametrize("option", OF_A_CHECKPOINT)
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_nothing_that_came_with_a_checkpoint_changes_an_answer(parts, monkeypatch, option, temperature):
    """verl#7270, trl#235: what is measured, or trained on, is the model and what the user set."""
    policy, codec = parts
    prompts = [codec.prompt_ids(prompt) for prompt in PROMPTS]

    def all_answers():
        torch.manual_seed(0)
        decoding = Decoding(6, 5, 2, temperature)
        return {place: [a.ids for a in many] for place, many in answers(policy, codec, prompts, decoding)}

    expected = all_answers()
    with_it = GenerationConfig(eos_token_id=policy.model.generation_config.eos_token_id)
    setattr(with_it, option, OF_A_CHECKPOINT[option])
    monkeypatch.setattr(policy.model, "generation_config", with_it)
    assert all_answers() == expected
    assert policy.model.generation_config is with_it, "it is saved with the model, as it came"


def test_an_answer_is_the_likeliest_token_each_time(parts):
    policy, codec = parts
    for prompt in PROMPTS:
        ids = list(codec.prompt_ids(prompt))
        start = len(ids)
        with policy.native_attention(), torch.no_grad():
            while len(ids) < start + 6 and ids[-1] != codec.tokenizer.eos_token_id:
                ids.append(int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()))
        ((_, (answer,)),) = answers(policy, codec, [ids[:start]], Decoding(6, 1))
        assert list(answer.ids) == ids[start:]
