"""`train` and `evaluate` end to end on a tiny model, through the Python twins."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import save_tiny, write_rows
from luthier import ConfigError, DataError, ModelPolicy, compose, evaluate, hookimpl, train
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier.registry.method_catalogue import catalogue


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and a file of rows: the model learns to answer each letter with the next."""
    path = tmp_path_factory.mktemp("model")
    save_tiny(path / "base")
    letters = "abcdefghijklmnop"
    rows = [{"prompt": f"{a} ->", "completion": f" {b}"} for a, b in itertools.pairwise(letters)]
    write_rows(path / "rows.jsonl", rows)
    held = [{"prompt": f"{a} -> ", "completion": f" {b}"} for a, b in zip("abc", "bcd", strict=True)]
    write_rows(path / "held.jsonl", held)
    return path


def overrides(folder, run_dir, *more):
    return [
        f"model.path={folder}/base", "model.dtype=float32", "data=jsonl", f"data.path={folder}/rows.jsonl",
        "batch_size=8", "optimiser.lr=1e-2", f"run_dir={run_dir}", "tracker=[metrics]", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_learns_saves_and_reads_back(folder, tmp_path, adapter):
    held_out = ["data@eval_data=jsonl", f"eval_data.path={folder}/held.jsonl", "evaluation.max_new_tokens=4"]
    config = compose(
        "train", overrides(folder, tmp_path / "run", f"adapter={adapter}", "epochs=10", *held_out)
    )
    result = train(config)
    assert result.steps == 20
    assert result.last_loss < 0.5 * result.first_loss
    assert result.after.loss < result.before.loss
    assert 0 <= result.after.accuracy <= 1
    assert result.after.samples[0].expected == " b"

    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20]
    assert lines[-1]["loss"] == result.last_loss
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["after"]["loss"] == result.after.loss
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["tokens_per_second"] > 0
    assert (result.run_dir / "config.yaml").read_text().count("path: ") >= 2

    again = compose("evaluate", [
        f"model.path={result.model_dir}", "model.dtype=float32", "data=jsonl",
        f"data.path={folder}/held.jsonl",
        f"run_dir={tmp_path}/again", "evaluation.max_new_tokens=4",
    ])  # fmt: skip
    report = evaluate(again)
    assert report.loss == pytest.approx(result.after.loss, rel=1e-5)
    assert [s.answer for s in report.samples] == [s.answer for s in result.after.samples]


def test_full_saves_a_transformers_folder(folder, tmp_path):
    result = train(compose("train", overrides(folder, tmp_path / "run", "adapter=full", "max_steps=1")))
    loaded = AutoModelForCausalLM.from_pretrained(result.model_dir)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(loaded(ids).logits, base(ids).logits)
    assert result.trainable_parameters == result.total_parameters == sum(p.numel() for p in base.parameters())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(folder, tmp_path):
    def weights(name, seed):
        more = ["max_steps=3", f"seed={seed}", "adapter.dropout=0.1"]
        result = train(compose("train", overrides(folder, tmp_path / name, *more)))
        return (result.model_dir / "adapter_model.safetensors").read_bytes()

    first = weights("a", 0)
    assert first == weights("b", 0)
    assert first != weights("c", 1)


def test_gradient_checkpointing_changes_nothing_but_memory(folder, tmp_path):
    losses = [
        train(
            compose(
                "train",
                overrides(
                    folder, tmp_path / str(flag), "max_steps=3", f"model.gradient_checkpointing={flag}"
                ),
            )
        ).last_loss
        for flag in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_run_folder_is_never_overwritten(folder, tmp_path):
    config = compose("train", overrides(folder, tmp_path / "run", "max_steps=1"))
    train(config)
    with pytest.raises(ConfigError, match="holds a run or a model already"):
        train(config)


@pytest.mark.parametrize(
    ("more", "error", "told"),
    [
        (["data.path=nowhere.jsonl"], ConfigError, "path=nowhere.jsonl: there is no such file"),
        (["epochs=0"], ConfigError, "epochs=0.0 .* no step to train"),
        (["max_length=2"], DataError, r"no usable row \(15 longer than 2 tokens\)"),
        (["schedule.name=cosin"], ConfigError, "did you mean 'cosine'"),
        (["adapter.targets=[q_prj]"], ConfigError, "q_proj"),
        (["adapter.init=zero"], ConfigError, "lora.init: 'zero' is not one of kaiming, pissa"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, more, error, told):
    with pytest.raises(error, match=told) as caught:
        train(compose("train", overrides(folder, tmp_path / "run", *more)))
    assert "\n" not in str(caught.value)


def test_held_out_rows_that_are_all_the_data_leave_nothing(folder, tmp_path):
    same = ["data@eval_data=jsonl", f"eval_data.path={folder}/rows.jsonl"]
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        train(compose("train", overrides(folder, tmp_path / "run", *same)))


HELD_OUT = ["data@eval_data=jsonl", "evaluation.max_new_tokens=4"]


@pytest.mark.parametrize("held_out", [True, False])
def test_an_adapter_on_the_output_head_trains_with_and_without_held_out_rows(folder, tmp_path, held_out):
    more = [*HELD_OUT, f"eval_data.path={folder}/held.jsonl"] if held_out else []
    targets = ["adapter.targets=[lm_head,q_proj]", "max_steps=3", *more]
    result = train(compose("train", overrides(folder, tmp_path / "run", *targets)))
    saved = load_file(result.model_dir / "adapter_model.safetensors")
    assert saved["base_model.model.lm_head.lora_B.weight"].abs().sum() > 0


def test_a_folder_that_holds_a_model_is_not_written_to(folder, tmp_path):
    kept = tmp_path / "mine" / "model"
    shutil.copytree(folder / "base", kept)
    with pytest.raises(ConfigError, match="holds a run or a model already"):
        train(compose("train", overrides(folder, kept.parent, f"model.path={kept}", "max_steps=1")))
    assert (kept / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="run_dir="):
        train(compose("train", overrides(folder, "", "max_steps=1")))


def test_a_run_that_fails_before_it_trains_leaves_its_name_free(folder, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError):
        train(compose("train", overrides(folder, run_dir, "data.path=nowhere.jsonl")))
    assert not run_dir.exists()
    assert train(compose("train", overrides(folder, run_dir, "max_steps=1"))).steps == 1


def test_a_run_folder_that_cannot_be_written_is_told(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/run cannot be written: "):
        train(compose("train", overrides(folder, tmp_path / "file" / "run", "max_steps=1")))


def test_the_template_a_run_trained_with_travels_with_its_result(folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": talk}) + "\n")
    more = [f"model.chat_template={template}", f"data.path={rows}", "max_steps=1"]
    result = train(compose("train", overrides(folder, tmp_path / "run", *more)))
    loaded = load_model(ModelConfig(path=str(result.model_dir)), train_base=False)
    assert loaded.tokenizer.chat_template == template.read_text()


def test_accuracy_is_a_share_of_the_answers_that_were_verified(folder, tmp_path):
    held = tmp_path / "mixed.jsonl"
    lines = [
        {"text": "what has no prompt"},
        {"text": "is not answered"},
        {"prompt": "zz", "completion": "y", "answer": 5},
    ]
    held.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = [*HELD_OUT, f"eval_data.path={held}", "max_steps=1"]
    after = train(compose("train", overrides(folder, tmp_path / "run", *more))).after
    assert (after.rows, after.scored) == (3, 1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["schedule.warmup=500", "max_steps=2"], "500 steps of warm-up are more than the run's 2"),
        (["max_length=9999"], "max_length=9999 is more than the model's context, 256"),
        (["optimiser.weight_decay=-1"], "weight_decay=-1.0 must not be negative"),
        (["optimiser.lr=nan"], "lr=nan must be positive"),
        (["epochs=inf"], "epochs=inf must be positive"),
        (["adapter.targets=5"], "targets=5: expected names"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(folder, tmp_path, more, told):
    with pytest.raises(ConfigError, match=told):
        train(compose("train", overrides(folder, tmp_path / "run", *more)))


def test_max_steps_goes_beyond_the_epochs(folder, tmp_path):
    assert train(compose("train", overrides(folder, tmp_path / "run", "max_steps=5", "epochs=1"))).steps == 5


def test_data_of_any_sort_reaches_the_run_through_its_options(folder, tmp_path):
    rows = "".join(f"{a},{b}\n" for a, b in zip("abcdeab", "bcdefbc", strict=True))
    (tmp_path / "rows.csv").write_text(f"question,reply\n{rows}{'long ' * 200},x\n")
    held = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    (tmp_path / "held.json").write_text(json.dumps(held))
    seen: list[str] = []

    class Seen:
        @hookimpl
        def after_header(self, lines: list[str]) -> None:
            seen.extend(lines)

    hooks = catalogue().hooks
    tracker = Seen()
    hooks.register(tracker)
    try:
        result = train(compose("train", [
            f"model.path={folder}/base", "model.dtype=float32", "model.chat_template=chatml", "batch_size=2",
            "data=csv", f"data.path={tmp_path}/rows.csv",
            "data.columns={prompt: question, completion: reply}",
            "data@eval_data=json", f"eval_data.path={tmp_path}/held.json", "evaluation.max_new_tokens=2",
            "row_filter=exact_duplicates", "row_filters.exact_duplicates.ignore_case=true",
            "objective.supervise=last", "overflow=truncate_left", "max_length=40",
            f"run_dir={tmp_path}/run", "tracker=[]",
        ]))  # fmt: skip
    finally:
        hooks.unregister(tracker)
    assert result.steps == 3
    data = [line for line in seen if line.startswith(("data", "held out", "  "))]
    assert data[0].startswith("data      6 rows · ")
    assert [line.strip() for line in data[1:3]] == [
        "dropped: 2 exact duplicates", "truncated: 1 cut on the left to 40 tokens",
    ]  # fmt: skip
    assert data[3].startswith("held out  1 row · ")


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_fuses_what_the_option_says(folder, tmp_path, fused, monkeypatch):
    seen = []
    plain = ModelPolicy.check
    monkeypatch.setattr(ModelPolicy, "check", lambda policy: seen.append(policy.model) or plain(policy))
    more = [f"model.fused={str(fused).lower()}", "max_steps=1", "adapter.targets=[q_proj]", "adapter=lora"]
    result = train(compose("train", overrides(folder, tmp_path / "run", *more)))
    evaluate(
        compose("evaluate", [
            f"model.path={result.model_dir}", "model.dtype=float32", f"model.fused={str(fused).lower()}",
            "data=jsonl", f"data.path={folder}/held.jsonl", f"run_dir={tmp_path}/again",
            "evaluation.max_new_tokens=2",
        ])
    )  # fmt: skip
    assert ["forward" in vars(model.model.layers[1].mlp) for model in seen] == [fused, fused]
