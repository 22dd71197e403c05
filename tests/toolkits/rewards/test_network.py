"""Judges: the prompt scored once, a base of their own or beside another adapter, text re-tokenised."""

import json
import shutil

import pytest
import torch

from helpers import save_tiny, tiny_tokenizer, write_rows
from luthier import (
    Candidate,
    Codec,
    ConfigError,
    DataError,
    ModelError,
    ModelPolicy,
    Place,
    Row,
    compose,
    train,
)
from luthier.adapters.linear_adapter import adapted_layers
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier.models.score_head import head_of
from luthier_plugins.reward_models.process import Process
from luthier_toolkits.rewards.detached import DetachedAdapter
from luthier_toolkits.rewards.network import answer_tree, reward_network

PROMPT = [{"role": "user", "content": "a then"}]
CANDIDATES = [Candidate(PROMPT, text) for text in ("a a", "no", "a a a", "", "b")]
CANDIDATES += [Candidate(prompt, "a") for prompt in ("plain text", [{"role": "user", "content": "other"}])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judges")
    save_tiny(path / "base")
    letters = "abcdefgh"
    pairs = [{"prompt": f"{a} then", "chosen": f" {a}{a}", "rejected": f" {a} no"} for a in letters]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    steps = [{"prompt": f"{a}?", "steps": [f"{a} is {a}", "no"], "labels": [1, 0]} for a in letters]
    write_rows(path / "reward.jsonl", pairs)
    write_rows(path / "sft.jsonl", rows)
    write_rows(path / "process_reward.jsonl", steps)
    for objective in ("reward", "sft", "process_reward"):
        train(compose("train", [
            f"model.path={path}/base", "model.dtype=float32", "data=jsonl",
            f"data.path={path}/{objective}.jsonl", f"objective={objective}", "optimiser.lr=1e-2",
            "adapter.dropout=0", "adapter.rank=4", "epochs=3", f"run_dir={path}/{objective}", "tracker=[]",
        ]))  # fmt: skip
    return path


def loaded(path):
    return load_model(ModelConfig(path=str(path), dtype="float32"), train_base=False, train_adapter=True)


def plain(path, one):
    """The score of one sequence through the whole model."""
    model = loaded(path)
    tree = answer_tree(one, Codec(model.tokenizer))
    policy = ModelPolicy(model.model)
    with policy.native_attention(), torch.no_grad():
        ids = torch.tensor([tree.prompt + tree.branches[0].ids])
        return head_of(model.model)(model.model.get_decoder()(ids).last_hidden_state)[0, -1].item()


def place(**more):
    return Place(dtype="float32", device="cpu", **more)


@pytest.mark.slow
def test_scores_are_those_of_one_candidate_at_a_time(folder):
    judge = reward_network(str(folder / "reward"), "sequence", place(), "outcome")
    scores = judge.ends(CANDIDATES)
    assert scores.dtype == torch.float32
    expected = [plain(folder / "reward", one) for one in CANDIDATES]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert len({round(score, 4) for score in scores.tolist()}) == len(CANDIDATES)


def test_a_prompt_is_run_once_for_all_its_completions(folder, monkeypatch):
    judge, seen = reward_network(str(folder / "reward"), "sequence", place(), "outcome"), []
    plain_scores = ModelPolicy.scores
    monkeypatch.setattr(
        ModelPolicy, "scores", lambda self, pack, at: seen.append(pack) or plain_scores(self, pack, at)
    )
    judge.ends(CANDIDATES)
    assert [len(tree.branches) for pack in seen for tree in pack.trees] == [5, 1, 1]


def test_an_adapter_beside_another_gives_the_same_and_leaves_no_trace(folder):
    host = loaded(folder / "sft")
    policy = ModelPolicy(host.model)
    before = {name: id(layer) for name, layer in adapted_layers(host.model).items()}
    trained = [name for name, p in host.model.named_parameters() if p.requires_grad]
    tree = answer_tree(CANDIDATES[0], Codec(host.tokenizer))
    with policy.native_attention(), torch.no_grad():
        logits = host.model(torch.tensor([tree.prompt])).logits
    policy = ModelPolicy(host.model)
    beside = reward_network(str(folder / "reward"), "sequence", place(host=host), "outcome")
    assert isinstance(beside.detached, DetachedAdapter)
    assert beside.policy.model is host.model
    host.model.train()
    found = beside.ends(CANDIDATES)
    assert host.model.training
    alone = reward_network(str(folder / "reward"), "sequence", place(), "outcome").ends(CANDIDATES)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert {name: id(layer) for name, layer in adapted_layers(host.model).items()} == before
    assert [name for name, p in host.model.named_parameters() if p.requires_grad] == trained
    assert head_of(host.model) is None
    host.model.eval()
    with policy.native_attention(), torch.no_grad():
        assert torch.equal(host.model(torch.tensor([tree.prompt])).logits, logits)


def test_what_fails_while_it_is_worn_leaves_the_model_as_it_was(folder):
    host = loaded(folder / "sft")
    before = {name: id(layer) for name, layer in adapted_layers(host.model).items()}
    detached = DetachedAdapter.load(host.model, folder / "reward" / "model")

    def fail() -> None:
        with detached.on(host.model):
            assert head_of(host.model) is detached.head
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {name: id(layer) for name, layer in adapted_layers(host.model).items()} == before


def test_an_unfinished_completion_has_no_end_token(folder):
    codec = Codec(loaded(folder / "base").tokenizer)
    ended, cut = (answer_tree(Candidate(PROMPT, "a a", finished=f), codec) for f in (True, False))
    assert ended.branches[0].ids == (*cut.branches[0].ids, codec.tokenizer.eos_token_id)


def test_the_judges_own_tokenizer_reads_the_text(folder, tmp_path):
    """A judge with other token ids gives, of the same text, what it gives by itself."""
    shutil.copytree(folder / "reward", tmp_path / "reward")
    file = tmp_path / "reward" / "model" / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    one, other = (next(key for key in vocabulary if key.strip("ĠĊ▁ ") == letter) for letter in ("a", "b"))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokens))
    host = loaded(folder / "sft")
    swapped = reward_network(str(tmp_path / "reward"), "sequence", place(host=host), "outcome").ends(
        CANDIDATES
    )
    plain_ = reward_network(str(folder / "reward"), "sequence", place(host=host), "outcome").ends(CANDIDATES)
    assert not torch.allclose(swapped, plain_)


def test_a_candidate_beyond_the_context_is_named(folder):
    judge = reward_network(str(folder / "reward"), "sequence", place(), "outcome")
    long = Candidate("a " * (judge.context + 1), "a", row=Row({}, "rows.jsonl:7"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .* tokens of prompt and completion are more than"):
        judge.ends([long])


@pytest.mark.parametrize(
    ("path", "kind", "error", "told"),
    [
        (None, "sequence", ConfigError, r"reward_models\.outcome\.model is missing"),
        ("./nowhere", "sequence", ModelError, r"reward_models\.outcome\.model=\./nowhere is not there"),
        ("sft", "sequence", ModelError, "it has no score head; expected a reward model of the kind sequence"),
        ("process_reward", "sequence", ModelError, "its head is of the kind token; expected"),
        ("reward", "token", ModelError, "its head is of the kind sequence; expected"),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_no_judge_is_refused(folder, path, kind, error, told, shared):
    here = place(host=loaded(folder / "sft")) if shared else place()
    path = path and (path if path.startswith(".") else str(folder / path))
    with pytest.raises(error, match=told):
        reward_network(path, kind, here, "outcome")


def test_a_judge_sees_what_may_be_called():
    # The row's tools stand in the prompt that it is scored under, as in training.
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + tokenizer.chat_template
    )
    row = Row({"prompt": PROMPT, "tools": [{"name": "add"}]}, "f:1")
    codec = Codec(tokenizer)
    for text in ("two", ""):
        tree = answer_tree(Candidate(PROMPT, text, row=row), codec)
        assert list(tree.prompt) == codec.prompt_ids(PROMPT, tools=[{"name": "add"}])
    tree = Process(model="m")._tree(Candidate(PROMPT, "two", row=row), codec)
    assert list(tree.prompt) == codec.prompt_ids(PROMPT, tools=[{"name": "add"}])
