"""Score heads: what they give, and that transformers' own classes give the same from what is saved."""

import json
import shutil

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from helpers import crash, save_tiny, tiny_gpt2, tiny_llama, write_rows
from luthier import Codec, ConfigError, ModelError, ModelPolicy, Pack, Row, compose, evaluate, train
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier.models.score_head import as_classifier, attach_head, head_name, head_of
from luthier_toolkits.preference.pair_rows import pair_tree

pytestmark = pytest.mark.slow

CLASSES = {"sequence": tf.AutoModelForSequenceClassification, "token": tf.AutoModelForTokenClassification}
KINDS = {"sequence": "reward", "token": "process_reward"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("heads")
    save_tiny(path / "base")
    letters = "abcdefghijkl"
    pairs = [{"prompt": f"{a} then", "chosen": f" {a}{a}", "rejected": f" {a} no"} for a in letters]
    steps = [
        {"prompt": f"{a}?", "steps": [f"{a} is {a}", f"{a} is no"], "labels": [True, False]} for a in letters
    ]
    write_rows(path / "sequence.jsonl", pairs)
    write_rows(path / "token.jsonl", steps)
    return path


def given(folder, run_dir, kind, adapter, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/{kind}.jsonl",
        f"objective={KINDS[kind]}", f"adapter={adapter}", "optimiser.lr=1e-2", "batch_size=6", "epochs=3",
        f"run_dir={run_dir}", "tracker=[metrics]", "log_every=1", *more,
    ]  # fmt: skip


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**line, **line["metrics"]} for line in lines]


def our_scores(path, kind, text="a then aa"):
    """Every score of a plain forward of Luthier's policy on what was loaded again."""
    loaded = load_model(ModelConfig(path=str(path), dtype="float32"), train_base=False)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    policy = ModelPolicy(loaded.model)
    with policy.native_attention(), torch.no_grad():
        hidden = loaded.model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state
    scores = head_of(loaded.model)(hidden)[0]
    return ids, scores if kind == "token" else scores[-1]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_transformers_gives_the_scores_of_what_is_saved(folder, tmp_path, kind, adapter):
    run = tmp_path / "run"
    train(compose("train", given(folder, run, kind, adapter)))
    ids, ours = our_scores(run, kind)
    if adapter == "full":
        theirs = CLASSES[kind].from_pretrained(run / "model")
        assert theirs.config.num_labels == 1
    else:
        base = CLASSES[kind].from_pretrained(folder / "base", num_labels=1)
        theirs = peft.PeftModel.from_pretrained(base, run / "model")
    theirs.eval()
    # The longer row makes padding matter.
    width = len(ids) + 3
    pad = load_model(ModelConfig(path=str(run)), train_base=False).tokenizer.pad_token_id
    theirs.config.pad_token_id = pad
    rows = torch.tensor([ids + [pad] * 3, list(range(3, 3 + width))])
    mask = torch.tensor([[1] * len(ids) + [0] * 3, [1] * width])
    with torch.no_grad():
        logits = theirs(input_ids=rows, attention_mask=mask).logits[0]
    found = logits[: len(ids), 0] if kind == "token" else logits[0]
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-6)
    assert float(ours.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", CLASSES)
def test_a_head_trains_with_its_adapter_and_learns(folder, tmp_path, kind):
    result = train(compose("train", given(folder, tmp_path / "run", kind, "lora", "epochs=8")))
    told = metrics(tmp_path / "run")
    name = "pair_accuracy" if kind == "sequence" else "step_accuracy"
    assert told[-1][name] == 1.0
    assert told[-1]["loss"] < 0.5 * told[0]["loss"]
    assert result.after is None
    tensors = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in tensors
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    assert config["task_type"] == {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[kind]


def test_what_peft_saved_is_read(folder, tmp_path):
    base = CLASSES["sequence"].from_pretrained(folder / "base", num_labels=1)
    made = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    )
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    made.save_pretrained(tmp_path / "peft")
    ids, ours = our_scores(tmp_path / "peft", "sequence")
    with torch.no_grad():
        theirs = made.eval()(input_ids=torch.tensor([ids])).logits[0, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_evaluation_of_what_was_saved_is_that_of_the_run(folder, tmp_path):
    held = ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl"]
    pairs = [json.loads(line) for line in (folder / "sequence.jsonl").read_text().splitlines()]
    write_rows(folder / "held.jsonl", [{**row, "prompt": row["prompt"] + " it"} for row in pairs[:5]])
    result = train(compose("train", given(folder, tmp_path / "run", "sequence", "lora", *held)))
    again = evaluate(compose("evaluate", [
        f"model.path={tmp_path}/run", "model.dtype=float32", "data=jsonl", f"data.path={folder}/held.jsonl",
        "objective=reward", f"run_dir={tmp_path}/again", "tracker=[]",
    ]))  # fmt: skip
    assert again.loss == pytest.approx(result.after.loss, rel=1e-5)
    assert again.metrics == pytest.approx(result.after.metrics, rel=1e-4)
    assert again.perplexity is None
    assert again.samples == []
    assert (tmp_path / "again" / "calibration.png").stat().st_size > 10_000


def test_a_reward_model_goes_on_training_with_its_head(folder, tmp_path):
    train(compose("train", given(folder, tmp_path / "first", "sequence", "lora", "epochs=8")))
    more = given(folder, tmp_path / "second", "sequence", "lora", "epochs=1", "optimiser.lr=1e-9")
    train(compose("train", [one.replace(f"{folder}/base", f"{tmp_path}/first") for one in more]))
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert second[0]["loss"] < 0.1 * first[0]["loss"]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_checkpoint_without_its_head_is_refused(folder, tmp_path, adapter):
    run = tmp_path / "run"
    train(compose("train", given(folder, run, "sequence", adapter, "epochs=1")))
    name = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    tensors = load_file(run / "model" / name)
    kept = {key: value for key, value in tensors.items() if "score" not in key}
    assert len(kept) == len(tensors) - 1
    save_file(kept, run / "model" / name, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="head"):
        load_model(ModelConfig(path=str(run)), train_base=False)


def test_a_language_model_is_no_reward_model(folder, tmp_path):
    config = compose("evaluate", [
        f"model.path={folder}/base", "data=jsonl", f"data.path={folder}/sequence.jsonl", "objective=reward",
        f"run_dir={tmp_path}/run",
    ])  # fmt: skip
    with pytest.raises(
        ModelError, match=r"objective=reward measures a reward model, and .*base has no score"
    ):
        evaluate(config)


def test_a_head_of_another_kind_is_refused(folder, tmp_path):
    train(compose("train", given(folder, tmp_path / "first", "sequence", "lora", "epochs=1")))
    more = given(folder, tmp_path / "second", "token", "lora")
    with pytest.raises(ModelError, match=r"needs a head of the kind token, and that of .* kind sequence"):
        train(compose("train", [one.replace(f"{folder}/base", f"{tmp_path}/first") for one in more]))


def test_a_classifier_of_several_labels_is_refused(folder, tmp_path):
    model = CLASSES["sequence"].from_pretrained(folder / "base", num_labels=3)
    model.save_pretrained(tmp_path / "three")
    for file in (folder / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "three")
    with pytest.raises(ModelError, match="its head has 3 labels; a reward model has one score"):
        load_model(ModelConfig(path=str(tmp_path / "three")), train_base=False)


def test_scores_are_those_of_one_sequence_at_a_time(folder):
    loaded = load_model(ModelConfig(path=str(folder / "base"), dtype="float32"), train_base=False)
    head = attach_head(loaded.model, "sequence", torch.Generator().manual_seed(0))
    codec, policy = Codec(loaded.tokenizer), ModelPolicy(loaded.model)
    rows = [json.loads(line) for line in (folder / "sequence.jsonl").read_text().splitlines()]

    trees = [pair_tree(Row(row, "row"), codec) for row in rows[:3]]
    pack = Pack.of(trees)
    found = policy.scores(pack, pack.ends)
    with policy.native_attention():
        paths = [tree.prompt + branch.ids for tree in trees for branch in tree.branches]
        hidden = [loaded.model.get_decoder()(torch.tensor([path])).last_hidden_state[0, -1] for path in paths]
    torch.testing.assert_close(found, head(torch.stack(hidden)), rtol=1e-5, atol=1e-6)


def test_heads_are_called_as_transformers_calls_them():
    assert head_name(tiny_llama(), "token") == "score"
    assert head_name(tiny_gpt2(), "token") == "classifier"
    assert head_name(tiny_gpt2(), "sequence") == "score"
    plain = tiny_llama()
    assert as_classifier(plain) is plain
    attach_head(plain, "value", torch.Generator())
    assert as_classifier(plain) is plain, "a value function is no part of what is saved"


def test_the_pad_token_is_never_the_end(folder, tmp_path):
    save_tiny(tmp_path / "base")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    given_ = [one.replace(f"{folder}/base", f"{tmp_path}/base") for one in given(
        folder, tmp_path / "run", "sequence", "full", "epochs=1")]  # fmt: skip
    train(compose("train", given_))
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    beside = tf.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved["pad_token_id"] == beside.pad_token_id != beside.eos_token_id


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(folder, tmp_path):

    options = given(folder, "RUN", "sequence", "lora", "batch_size=5", "checkpoint.every=3")
    whole = train(compose("train", [one.replace("RUN", str(tmp_path / "whole")) for one in options]))
    crash([one.replace("RUN", str(tmp_path / "broken")) for one in options], 5)
    again = train(compose("train", [f"resume={tmp_path / 'broken'}"]))
    for name in ("adapter_model.safetensors",):
        assert (again.model_dir / name).read_bytes() == (whole.model_dir / name).read_bytes()


def test_a_negative_centre_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"objective\.centre=-1\.0 must not be negative"):
        train(compose("train", given(folder, tmp_path / "run", "sequence", "lora", "objective.centre=-1")))
