"""Whole preference runs: packs, resumes, what is remembered, references of every kind, what is refused."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers import crash, save_tiny, tiny_llama, tiny_tokenizer, write_rows
from luthier import (
    ConfigError,
    DataError,
    LuthierError,
    ModelError,
    ModelPolicy,
    compose,
    evaluate,
    hookimpl,
    train,
)
from luthier.evaluation import reference_pass as passes
from luthier.registry.method_catalogue import catalogue

pytestmark = pytest.mark.slow

PAIRED = ["dpo", "ipo", "orpo", "simpo"]
REFERRING = ["dpo", "ipo", "kto"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("preferences")
    for name, seed in (("base", 0), ("other", 1)):
        save_tiny(path / name, seed)
    letters = "abcdefghijkl"
    pairs = [
        {"prompt": f"{a} then", "chosen": f" {b}{b}", "rejected": f" {a} no"}
        for a, b in zip(letters, letters[1:] + "z", strict=True)
    ]
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs for side in ("chosen", "rejected")
    ]  # fmt: skip
    held = [{**row, "prompt": row["prompt"] + " it"} for row in pairs[:4]]
    for name, rows in (("pairs", pairs), ("labelled", labelled), ("held", held)):
        write_rows(path / f"{name}.jsonl", rows)
    return path


def overrides(folder, run_dir, objective, *more):
    rows = "labelled" if objective == "kto" else "pairs"
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/{rows}.jsonl",
        f"objective={objective}", "adapter.rank=4", "adapter.dropout=0", "batch_size=6", "optimiser.lr=1e-2",
        f"run_dir={run_dir}", "tracker=[metrics]", "log_every=1", "epochs=3", *more,
    ]  # fmt: skip


def lines(run):
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**line, **line["metrics"]} for line in read]


@pytest.mark.parametrize("objective", [*PAIRED, "kto"])
def test_a_run_learns_to_prefer(folder, tmp_path, objective):
    result = train(compose("train", overrides(folder, tmp_path / "run", objective)))
    told = lines(tmp_path / "run")
    name = "label_accuracy" if objective == "kto" else "pair_accuracy"
    assert told[-1]["loss"] < told[0]["loss"]
    assert told[-1][name] > 0.9
    assert result.last_loss == told[-1]["loss"]


@pytest.mark.parametrize("objective", [*PAIRED, "kto"])
def test_a_step_does_not_depend_on_its_packs(folder, tmp_path, objective):
    weights = []
    for name, tokens in (("whole", 2048), ("parts", 24)):
        more = ["max_steps=2", "optimiser=adamw", "optimiser.eps=1e-2", f"pack_tokens={tokens}"]
        result = train(compose("train", overrides(folder, tmp_path / name, objective, *more)))
        weights.append(load_file(result.model_dir / "adapter_model.safetensors"))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "adapter"), [*((one, "lora") for one in (*PAIRED, "kto")), ("dpo", "full"), ("kto", "full")]
)
def test_a_run_goes_on_in_the_middle_of_an_epoch_to_the_same_bits(folder, tmp_path, objective, adapter):
    given = overrides(folder, "RUN", objective, "checkpoint.every=3", "batch_size=5", "pack_tokens=40")
    if adapter == "full":
        given = [one for one in given if not one.startswith("adapter.")] + ["adapter=full"]
    whole = train(compose("train", [one.replace("RUN", str(tmp_path / "whole")) for one in given]))
    broken = [one.replace("RUN", str(tmp_path / "broken")) for one in given]
    crash(broken, 5)
    again = train(compose("train", [f"resume={tmp_path / 'broken'}"]))
    assert again.steps == whole.steps
    names = sorted(path.name for path in whole.model_dir.glob("*.safetensors"))
    assert names
    for name in names:
        assert (again.model_dir / name).read_bytes() == (whole.model_dir / name).read_bytes()


class Passes:
    """Counts the completions that the reference was asked about."""

    def __init__(self):
        self.totals = []

    @hookimpl
    def while_measuring(self, what, done, total):
        if done == total:
            self.totals.append(total)


@pytest.fixture
def asked():
    counting, hooks = Passes(), catalogue().hooks
    hooks.register(counting)
    yield counting.totals
    hooks.unregister(counting)


def test_the_reference_is_asked_once_for_each_completion(folder, tmp_path, asked):
    memory = f"reference.cache={tmp_path}/shared"
    train(compose("train", overrides(folder, tmp_path / "one", "dpo", memory, "seed=1")))
    assert asked == [24]
    train(compose("train", overrides(folder, tmp_path / "two", "dpo", memory, "seed=2")))
    train(compose("train", overrides(folder, tmp_path / "three", "ipo", memory, "adapter.rank=2")))
    assert asked == [24], "the same model and rows were measured again"
    assert len(list((tmp_path / "shared").glob("*.safetensors"))) == 1


def test_a_changed_row_and_a_changed_model_are_noticed(folder, tmp_path, asked, caplog):
    memory = f"reference.cache={tmp_path}/shared"
    train(compose("train", overrides(folder, tmp_path / "one", "dpo", memory)))
    rows = (folder / "pairs.jsonl").read_text().replace('" bb"', '" bbb"')
    (tmp_path / "changed.jsonl").write_text(rows)
    changed = f"data.path={tmp_path}/changed.jsonl"
    train(compose("train", overrides(folder, tmp_path / "two", "dpo", memory, changed)))
    assert asked == [24, 1]
    with caplog.at_level(logging.WARNING, "luthier"):
        train(
            compose(
                "train", overrides(folder, tmp_path / "three", "dpo", memory, f"model.path={folder}/other")
            )
        )
    assert asked == [24, 1, 24]
    assert "remembers another reference" in caplog.text


def test_another_config_of_the_same_weights_is_another_reference(folder, tmp_path, asked):
    shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    memory = f"reference.cache={tmp_path}/shared"
    train(compose("train", overrides(folder, tmp_path / "one", "dpo", memory)))
    train(compose("train", overrides(folder, tmp_path / "two", "dpo", memory, f"model.path={tmp_path}/base")))
    assert asked == [24, 24]
    assert lines(tmp_path / "two")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_what_a_short_run_does_not_see_is_not_measured(folder, tmp_path, asked):
    given = overrides(folder, tmp_path / "run", "dpo", "max_steps=1", "batch_size=4", "checkpoint.every=1")
    train(compose("train", given))
    assert asked == [8]
    train(compose("train", [f"resume={tmp_path / 'run'}", "max_steps=2"]))
    assert asked == [8, 8], "going on measures what else is seen"


def test_an_interrupted_pass_goes_on_where_it_was(folder, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(passes, "WINDOW", 5)
    plain, calls = passes._Pass._measured, []

    def interrupted(self, policy, trees):
        calls.append(len(trees))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, policy, trees)

    monkeypatch.setattr(passes._Pass, "_measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(compose("train", overrides(folder, tmp_path / "run", "dpo")))
    train(compose("train", [f"resume={tmp_path / 'run'}"]))
    assert asked == [14], "ten of the 24 completions were kept"


def test_an_evaluation_compares_with_what_its_run_compared_with(folder, tmp_path):
    train(compose("train", overrides(folder, tmp_path / "first", "dpo")))
    held = ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.generate=false"]
    top = overrides(folder, tmp_path / "top", "dpo", f"model.path={tmp_path}/first", "adapter.rank=4", *held)
    result = train(compose("train", top))
    again = evaluate(compose("evaluate", [
        f"model.path={tmp_path}/top", "model.dtype=float32", "data=jsonl", f"data.path={folder}/held.jsonl",
        "objective=dpo", "evaluation.generate=false", f"run_dir={tmp_path}/again",
    ]))  # fmt: skip
    assert again.metrics["margin"] == pytest.approx(result.after.metrics["margin"], rel=1e-3)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("reference.model=./nowhere", r"reference\.model=\./nowhere is not there"),
        (
            "reference.cache={folder}/pairs.jsonl",
            r"reference\.cache=.*pairs\.jsonl is a file; expected a folder",
        ),
    ],
)
def test_a_reference_that_cannot_be_is_told_before_the_rows_are_read(folder, tmp_path, option, told):
    given = overrides(
        folder, tmp_path / "run", "dpo", option.format(folder=folder), "data.path=missing.jsonl"
    )
    with pytest.raises((ModelError, ConfigError), match=told):
        train(compose("train", given))


def test_a_resumed_run_refuses_another_reference(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    given = overrides(
        folder, tmp_path / "run", "dpo", f"model.path={base}", "checkpoint.every=1", "max_steps=2"
    )
    train(compose("train", given))
    shutil.copytree(folder / "other", base, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="not the one that this run began with"):
        train(compose("train", [f"resume={tmp_path / 'run'}", "max_steps=4"]))


def test_another_checkpoint_can_be_the_reference(folder, tmp_path):
    told = {}
    for name, more in (("itself", []), ("other", [f"reference.model={folder}/other"])):
        train(compose("train", overrides(folder, tmp_path / name, "dpo", "max_steps=1", *more)))
        told[name] = lines(tmp_path / name)[0]["loss"]
    assert told["itself"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(told["other"] - 0.6931) > 1e-3


def test_a_reference_with_another_vocabulary_is_refused(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    given = overrides(folder, tmp_path / "run", "dpo", f"reference.model={tmp_path}/wide")
    with pytest.raises(ModelError, match=r"reference\.model=.*its vocabulary \(.*\) is not the model's"):
        train(compose("train", given))


def test_a_value_that_is_not_finite_names_its_row(folder, tmp_path, monkeypatch):
    plain = passes.ModelPolicy.logprobs

    def broken(self, pack):
        found = plain(self, pack)
        if any(tree.origin.endswith(":3") for tree in pack.trees):
            found.values[:] = -torch.inf
        return found

    monkeypatch.setattr(passes.ModelPolicy, "logprobs", broken)
    with pytest.raises(DataError, match=r"pairs\.jsonl:3.*the log-probability -inf"):
        train(compose("train", overrides(folder, tmp_path / "run", "dpo", "pack_tokens=8")))


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_a_loss_that_is_not_finite_names_its_row_among_those_of_its_pack(
    folder, tmp_path, monkeypatch, objective
):
    plain = ModelPolicy.logprobs

    def broken(self, pack):
        found = plain(self, pack)
        bad = [tree.origin.endswith(":3") for tree in pack.trees]
        factor = [torch.inf if bad[tree] else 1.0 for tree in pack.tree_of]
        lengths = torch.tensor(found.lengths)
        return replace(found, values=found.values * torch.tensor(factor).repeat_interleave(lengths))

    monkeypatch.setattr(ModelPolicy, "logprobs", broken)
    with pytest.raises(
        LuthierError, match=r"the loss is not finite; its rows: [^,]*pairs\.jsonl:3\. The last"
    ):
        train(compose("train", overrides(folder, tmp_path / "run", objective, "max_steps=40")))


def test_in_16_bits_a_model_without_an_adapter_can_be_either_side(folder, tmp_path):
    """Nothing of it trains, so its residual stream can be wide."""
    other = folder / "other"
    given = overrides(folder, tmp_path / "run", "dpo", f"reference.model={other}", "model.dtype=bfloat16")
    assert train(compose("train", given)).first_loss != pytest.approx(0.6931, abs=1e-4)
    measure = [
        f"model.path={other}", "data=jsonl", f"data.path={folder}/held.jsonl", "objective=dpo", "tracker=[]",
        "evaluation.generate=false", f"run_dir={tmp_path}/measured",
    ]  # fmt: skip
    with pytest.raises(ModelError, match="carries no adapter"):
        evaluate(compose("evaluate", measure))
    report = evaluate(compose("evaluate", [*measure, f"reference.model={folder}/base"]))
    assert 0 < report.loss < 2


def test_what_is_not_read_of_a_reference_is_said(folder, tmp_path, caplog):
    train(compose("train", overrides(folder, tmp_path / "run", "orpo", "reference.model=nowhere")))
    assert "reference.model is not read: objective=orpo has no reference" in caplog.text


def test_rows_that_are_held_out_too_are_named_and_can_stop_a_run(folder, tmp_path):
    held = ["data@eval_data=jsonl", f"eval_data.path={folder}/pairs.jsonl", "evaluation.generate=false"]
    given = overrides(folder, tmp_path / "run", "dpo", *held, "unusable=refuse")
    with pytest.raises(DataError, match=r"rows of data are also in eval_data \([^)]*pairs\.jsonl:1, "):
        train(compose("train", given))


def test_held_out_pairs_are_measured(folder, tmp_path):
    held = ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.generate=false"]
    result = train(compose("train", overrides(folder, tmp_path / "run", "dpo", *held)))
    assert result.before.metrics["pair_accuracy"] == 0.5
    assert result.after.metrics["pair_accuracy"] > 0.5
    assert {"margin", "length/preferred", "length/chosen", "rewards/chosen"} <= result.after.metrics.keys()
    again = evaluate(compose("evaluate", [
        f"model.path={result.model_dir}", "model.dtype=float32", "data=jsonl",
        f"data.path={folder}/held.jsonl",
        "objective=dpo", "evaluation.generate=false", f"run_dir={tmp_path}/again",
    ]))  # fmt: skip
    assert again.loss == pytest.approx(result.after.loss, rel=1e-4)
    assert again.metrics["margin"] == pytest.approx(result.after.metrics["margin"], rel=1e-3)


def test_an_evaluation_without_anything_to_compare_with_says_so(folder, tmp_path):
    given = [
        f"model.path={folder}/base", "data=jsonl", f"data.path={folder}/held.jsonl", "objective=dpo",
        f"run_dir={tmp_path}/run", "model.dtype=float32",
    ]  # fmt: skip
    with pytest.raises(ModelError, match=r"objective=dpo compares with a reference.*reference\.model=FOLDER"):
        evaluate(compose("evaluate", given))


def test_contradictions_can_stop_a_run(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows.append({**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})
    write_rows(tmp_path / "rows.jsonl", rows)
    given = [f"data.path={tmp_path}/rows.jsonl", "max_steps=1"]
    train(compose("train", overrides(folder, tmp_path / "shown", "dpo", *given)))
    with pytest.raises(
        DataError, match=r"1 contradiction between rows: .*rows\.jsonl:1 and .*rows\.jsonl:13"
    ):
        train(compose("train", overrides(folder, tmp_path / "run", "dpo", *given, "unusable=refuse")))


def test_sft_on_the_chosen_side_is_an_option(folder, tmp_path):
    train(compose("train", overrides(folder, tmp_path / "run", "dpo", "auxiliary.sft=0.5", "max_steps=1")))
    first = lines(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(0.6931 + 0.5 * first["sft"], abs=1e-3)


def test_a_wrong_choice_of_what_becomes_of_rows_is_told(folder, tmp_path):
    with pytest.raises(ConfigError, match="unknown unusable 'dorp': did you mean 'drop'"):
        compose("train", overrides(folder, tmp_path / "run", "dpo", "unusable=dorp"))
