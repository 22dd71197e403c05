"""New tokens end to end: trained, saved as peft reads them, evaluated, folded, merged, continued, resumed."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import crash, tiny_gpt2, tiny_llama, tiny_tokenizer, write_rows
from luthier import ConfigError, ModelError, compose, evaluate, train
from luthier.adapters import adapter_off, train_tokens
from luthier.config.model_config import ModelConfig
from luthier.errors import LuthierError
from luthier.models import grow
from luthier.models.model import load_model, load_model_tokenizer
from luthier_plugins.commands.fold import fold
from luthier_plugins.commands.merge import merge

NEW = ["<think>", "</think>"]
ROWS = [
    {"prompt": f"<think>{number} + 1</think> =", "completion": f" <think>{number + 1}</think>"}
    for number in range(8)
]
VOCABULARY = len(tiny_tokenizer())
BASES = {
    "untied": lambda rows: tiny_llama(vocab_size=rows),
    "tied": lambda rows: tiny_llama(vocab_size=rows, tie_word_embeddings=True),
    "gpt2": lambda rows: tiny_gpt2(vocab_size=rows),
}


def saved(path, kind, rows=VOCABULARY):
    BASES[kind](rows).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    write_rows(path / "rows.jsonl", ROWS)
    return path


def overrides(base, run_dir, *more):
    return [
        f"model.path={base}", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={base}/rows.jsonl", "optimiser.lr=1e-2", "max_steps=3", "batch_size=4", "tracker=[]",
        f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def trained(base, run_dir, *more):
    options = ["adapter.rank=4", "adapter.dropout=0"] if "adapter=full" not in more else []
    new = f"model.new_tokens={json.dumps(NEW)}"
    return train(compose("train", overrides(base, run_dir, new, *options, *more)))


def logits_of(path, **options):
    loaded = load_model(
        ModelConfig(path=str(path), dtype="float32", device="cpu", **options), train_base=False
    )
    return logits(loaded.model), loaded


@torch.no_grad()
def logits(model):
    return model(torch.arange(VOCABULARY - 14, VOCABULARY + 2)[None]).logits


def close(mine, other, tolerance=1e-5):
    assert mine.shape == other.shape
    assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.fixture(scope="module", params=sorted(BASES))
def run(request, tmp_path_factory):
    base = saved(tmp_path_factory.mktemp(request.param), request.param)
    return base, trained(base, base / "run")


@pytest.mark.slow
def test_peft_reads_them_on_a_base_that_is_resized(run):
    peft = pytest.importorskip("peft")
    base, result = run
    mine, loaded = logits_of(result.model_dir)
    assert len(loaded.tokenizer) == VOCABULARY + 2
    theirs = AutoModelForCausalLM.from_pretrained(base)
    theirs.resize_token_embeddings(len(AutoTokenizer.from_pretrained(result.model_dir)))
    read = peft.PeftModel.from_pretrained(theirs, result.model_dir).eval()
    close(logits(read), mine)


@pytest.mark.slow
def test_old_rows_stay_and_new_ones_learn(run):
    """The new rows start at the mean of the old ones, which is what the reference has; theirs alone move."""
    base, result = run
    _, loaded = logits_of(result.model_dir)
    before = AutoModelForCausalLM.from_pretrained(base)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, now = (getattr(model, name)().weight.detach() for model in (before, loaded.model))
        assert torch.equal(now[:VOCABULARY], old)
        mean = old.mean(0)
        assert (now[VOCABULARY:] - mean).abs().amax(1).min() > 1e-3
        with adapter_off(loaded.model):
            close(getattr(loaded.model, name)().weight[VOCABULARY:], mean.expand(2, -1), 1e-6)
    assert result.last_loss < result.first_loss


@pytest.mark.slow
def test_folded_and_merged_it_is_the_model_that_was_trained(run, tmp_path):
    _, result = run
    mine, _ = logits_of(result.model_dir)
    fold(compose("fold", [str(f"model.path={result.model_dir}"), f"out={tmp_path}/folded", "dtype=float32"]))
    merge(compose("merge", [
        f"models={{one: {result.model_dir}, two: {result.model_dir}}}", "merger=soup",
        f"run_dir={tmp_path}/merged",
    ]))  # fmt: skip
    for folder in (tmp_path / "folded", tmp_path / "merged" / "model"):
        read = AutoModelForCausalLM.from_pretrained(folder)
        close(logits(read), mine)
        assert read.config.vocab_size == VOCABULARY + 2
        assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(NEW) == [
            VOCABULARY,
            VOCABULARY + 1,
        ]
    assert not (tmp_path / "merged" / "folded").exists()


@pytest.mark.slow
def test_evaluation_and_continuation_go_on_from_it(run, tmp_path):
    base, result = run
    report = evaluate(compose("evaluate", [
        f"model.path={result.model_dir}", "model.dtype=float32", "model.device=cpu", "data=jsonl",
        f"data.path={base}/rows.jsonl", f"run_dir={tmp_path}/evaluated", "evaluation.max_new_tokens=2",
    ]))  # fmt: skip
    assert report.loss < result.first_loss
    again = trained(result.run_dir, tmp_path / "again", f"data.path={base}/rows.jsonl")
    assert again.first_loss < result.first_loss
    config = json.loads((again.model_dir / "adapter_config.json").read_text())
    assert {tuple(ids) for ids in config["trainable_token_indices"].values()} == {
        (VOCABULARY, VOCABULARY + 1)
    }
    before, after = (load_file(place.model_dir / "adapter_model.safetensors") for place in (result, again))
    rows = [name for name in before if name.endswith("trainable_tokens_delta")]
    assert rows
    assert all(not torch.equal(before[name], after[name]) for name in rows)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_that_was_killed_ends_in_the_same_weights(adapter, tmp_path):
    base = saved(tmp_path / "base", "tied")
    whole = trained(base, tmp_path / "whole", f"adapter={adapter}")
    options = ["adapter.rank=4", "adapter.dropout=0"] if adapter == "lora" else []
    given = overrides(base, tmp_path / "killed", f"model.new_tokens={json.dumps(NEW)}", f"adapter={adapter}",
                      "checkpoint.every=1", "log_every=1", *options)  # fmt: skip
    crash(given, 2)
    resumed = train(compose("train", [*given, "resume=auto"]))
    name = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    mine, other = load_file(resumed.model_dir / name), load_file(whole.model_dir / name)
    assert all(torch.equal(mine[key], other[key]) for key in mine.keys() | other.keys())


@pytest.mark.slow
def test_full_fine_tuning_saves_the_larger_model(tmp_path):
    base = saved(tmp_path / "base", "untied")
    result = trained(base, tmp_path / "run", "adapter=full")
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.config.vocab_size == VOCABULARY + 2 == len(model.get_output_embeddings().weight)
    close(logits_of(result.model_dir)[0], logits(model))


@pytest.mark.slow
def test_the_reference_is_the_base_with_the_rows_as_they_start(tmp_path):
    """Before the first step policy and reference agree, so DPO begins at ln 2."""
    base = saved(tmp_path / "base", "tied")
    write_rows(base / "rows.jsonl", [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " <think>no"} for row in ROWS
    ])  # fmt: skip
    result = trained(base, tmp_path / "run", "objective=dpo", "batch_size=8", "max_steps=1")
    assert result.first_loss == pytest.approx(0.6931472, abs=1e-5)


def test_tokens_that_are_there_are_left_alone(tmp_path):
    base = saved(tmp_path / "base", "untied")
    config = ModelConfig(path=str(base), device="cpu", new_tokens=["<|im_start|>", "<think>", "<think>"])
    loaded = load_model(config, train_base=False)
    assert loaded.new_tokens == (VOCABULARY,)
    assert loaded.model.get_input_embeddings().num_embeddings == VOCABULARY + 1
    assert len(load_model_tokenizer(config).tokenizer) == VOCABULARY + 1


def test_spare_rows_of_the_base_are_used_as_they_are(tmp_path):
    """A checkpoint may have more rows than tokens: nothing grows, and nothing is drawn anew."""
    base = saved(tmp_path / "base", "untied", VOCABULARY + 8)
    loaded = load_model(
        ModelConfig(path=str(base), device="cpu", dtype="float32", new_tokens=NEW), train_base=False
    )
    assert loaded.new_tokens == (VOCABULARY, VOCABULARY + 1)
    stored = load_file(base / "model.safetensors")
    assert torch.equal(loaded.model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])


def test_a_tokenizer_with_more_tokens_than_rows_has_the_embedding_grow(tmp_path):
    """peft#2898: with model.resize, also for tokens that the tokenizer was given before."""
    base = saved(tmp_path / "base", "tied", VOCABULARY - 3)
    assert load_model(ModelConfig(path=str(base), device="cpu"), train_base=False).new_tokens == ()
    loaded = load_model(ModelConfig(path=str(base), device="cpu", resize=True), train_base=False)
    assert loaded.new_tokens == tuple(range(VOCABULARY - 3, VOCABULARY))
    assert len(loaded.model.get_output_embeddings().weight) == VOCABULARY


@pytest.mark.parametrize("given", ["''", "'  '"])
def test_blank_tokens_are_refused(given, tmp_path):
    base = saved(tmp_path / "base", "untied")
    with pytest.raises(ConfigError, match=r"model.new_tokens has '.*', which is blank"):
        train(compose("train", overrides(base, tmp_path / "run", f"model.new_tokens=[{given}]")))


@pytest.mark.slow
def test_new_tokens_cannot_join_an_adapter(run, tmp_path):
    base, result = run
    without = train(compose("train", overrides(base, tmp_path / "without", "adapter.rank=2", "max_steps=1")))
    for start, told in ((result, "cannot grow to"), (without, "new tokens cannot join")):
        with pytest.raises(LuthierError, match=rf"{told} .*luthier fold"):
            train(compose("train", overrides(
                start.run_dir, tmp_path / "run", f"data.path={base}/rows.jsonl", "model.new_tokens=['<x>']"
            )))  # fmt: skip


@pytest.mark.parametrize("change", ["adapted", "bias"])
def test_a_head_for_which_peft_has_no_form_is_refused(change):
    from luthier_plugins.adapters.lora import LoRA

    model = tiny_llama()
    grow(model, 322)
    if change == "adapted":
        LoRA(rank=2, targets=["lm_head"]).attach(model, torch.Generator())
    else:
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(322))
    with pytest.raises(ConfigError, match=r"an output head that has a bias or an adapter"):
        train_tokens(model, (320, 321))


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (None, "no tensor|are not the ids of the 2 rows"),
        ([300], "are not the ids of the 2 rows"),
        ([3, 3], "are not the ids of the 2 rows"),
        ([3, -1], "are not the ids of the 2 rows"),
        ({"lm_head": [3, 4]}, "are not the ids of the 2 rows"),
    ],
)
def test_ids_that_do_not_fit_are_refused(run, ids, told, tmp_path):
    _, result = run
    config = json.loads((result.model_dir / "adapter_config.json").read_text())
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": ids}))
    save_file(load_file(result.model_dir / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=told):
        logits_of(folder)


def test_the_log_is_quiet(run, caplog, tmp_path):
    """Nothing warns where all is well."""
    _, result = run
    with caplog.at_level(logging.WARNING, "luthier"):
        logits_of(result.model_dir)
    assert not caplog.records
