"""`merge`: what does not fit is refused or goes by a rule, named; what failed late goes on."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merging import LABELS, UP, base_and_tuned, digest, elected, merged, tuned, weights
from test_merging_adapters import adapter, whole
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from helpers import save_tiny, tiny_tokenizer, write_rows
from luthier import ConfigError, DataError, ModelError, compose
from luthier_plugins.commands.merge import merge
from luthier_plugins.commands.merge.report.result import MergeReport, show_merge
from luthier_plugins.commands.merge.run.tensor import MergedTensor
from luthier_plugins.mergers.soup import Soup

pytestmark = pytest.mark.slow

EXTRA = "model.extra.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, three models tuned from it, and an adapter of it."""
    root = tmp_path_factory.mktemp("models")
    base_and_tuned(root)
    for seed, label in enumerate("abc", 1):
        adapter(root / label, root / "base", seed)
    return root


def given(root, labels, change):
    """Let `change` edit the tensors of the models called `labels`."""
    for label in labels:
        tensors = weights(root / label)
        change(tensors)
        save_file(tensors, root / label / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copies(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize("label", ["base", ""])
def test_a_name_that_cannot_be_is_refused(models, tmp_path, label):
    paths = f"{{one: {models / 'one'}, {label}: {models / 'two'}}}" if label else f"[{models}/one,/]"
    with pytest.raises(ConfigError, match=r"models: .* cannot be a model's name"):
        merge(compose("merge", [f"models={paths}", "merger=soup", f"run_dir={tmp_path / 'run'}"]))


def test_more_models_than_the_method_takes_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(Soup, "most_inputs", 2)
    with pytest.raises(ConfigError, match="merger=soup takes 2 models at most, not 3"):
        merged(models, tmp_path / "run", "merger=soup")
    assert merged(models, tmp_path / "run", "merger=soup", labels=LABELS[:2])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("result", [["result=model"], ["result=adapter", "rank=64"]], ids=" ".join)
def test_an_adapter_on_a_tied_weight_is_refused(tmp_path, result):
    save_tiny(tmp_path / "base", tie_word_embeddings=True)
    given(tmp_path, ["base"], lambda own: own.update(
        {"lm_head.weight": own["model.embed_tokens.weight"].clone()}))  # fmt: skip
    adapter(tmp_path / "a", tmp_path / "base", 1, target_modules=["lm_head"])
    adapter(tmp_path / "b", tmp_path / "base", 2)
    with pytest.raises(ModelError, match=r"models\.a: its adapter changes one of lm_head\.weight and"):
        merged(tmp_path, tmp_path / "run", "merger=soup", *result, labels=("a", "b"), base=False)


def test_trimmed_adapters_are_what_the_models_folded_from_them_are(copies, tmp_path):
    """The layers that nobody adapts count as zeros of the model that is trimmed."""
    for label in "abc":
        (copies / "folded" / label).mkdir(parents=True)
        save_file(whole(copies / "base", copies / label), copies / "folded" / label / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        shutil.copyfile(copies / "base" / "config.json", copies / "folded" / label / "config.json")
    shutil.copytree(copies / "base", copies / "folded" / "base")
    options = ["merger=ties", "merger.trim=model", "merger.density=0.5"]
    one = merged(copies, tmp_path / "one", *options, labels="abc", base=False)
    other = merged(copies / "folded", tmp_path / "other", *options, labels="abc")
    found, expected = weights(one.model_dir), weights(other.model_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_a_tensor_that_only_one_model_has_is_copied_and_of_two_refused(copies, tmp_path):
    given(copies, ["one"], lambda own: own.update({EXTRA: torch.arange(6.0)}))
    report = merged(copies, tmp_path / "run", "merger=ties", "missing=present")
    assert weights(report.model_dir)[EXTRA].tolist() == [0, 1, 2, 3, 4, 5]
    given(copies, ["two"], lambda own: own.update({EXTRA: torch.arange(6.0) + 1}))
    with pytest.raises(ModelError, match=rf"{EXTRA} is in one, two and not in the base"):
        merged(copies, tmp_path / "other", "merger=ties", "missing=present")
    report = merged(copies, tmp_path / "soup", "merger=soup", "missing=present")
    assert weights(report.model_dir)[EXTRA].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_who_lacks_a_tensor_is_trimmed_over_what_it_has(copies, tmp_path):
    """Each model's share is of its own elements; the weight of a model that lacks a tensor is no mistake."""
    given(copies, ["one"], lambda own: own.pop(UP))
    options = ["merger=ties", "merger.trim=model", "missing=present", "+merger.weights.one=1"]
    found = weights(merged(copies, tmp_path / "run", *options).model_dir)
    base = weights(copies / "base")
    kept = {}
    for label in LABELS:
        deltas = {name: one - base[name] for name, one in weights(copies / label).items()}
        sizes = torch.cat([one.abs().flatten() for one in deltas.values()]).sort(descending=True).values
        least = float(sizes[int(0.2 * len(sizes)) - 1])
        kept[label] = {name: one * (one.abs() >= least) for name, one in deltas.items()}
    for name in (UP, DOWN):
        expected = base[name] + elected([own[name] for own in kept.values() if name in own])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["merger=soup", "merger=ties", "merger=slerp"])
def test_a_tensor_without_elements_stays_one(copies, tmp_path, method):
    given(copies, [*LABELS, "base"], lambda own: own.update({EXTRA: torch.empty(0, 4)}))
    report = merged(copies, tmp_path / "run", method, labels=LABELS[:2])
    assert weights(report.model_dir)[EXTRA].shape == (0, 4)


def test_the_widest_dtype_is_written_and_said(copies, tmp_path):
    tuned(copies / "one", copies / "base", 2, torch.bfloat16)
    report = merged(copies, tmp_path / "run", "merger=soup", base=False)
    assert weights(report.model_dir)[UP].dtype == torch.float32
    assert any("stored in several dtypes, and written in the widest" in note for note in report.notes)


def test_models_that_number_tokens_differently_are_refused(copies, tmp_path):
    tokens = json.loads((copies / "two" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, two = list(vocabulary)[:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (copies / "two" / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ModelError, match=r"models\.one and models\.two number their tokens differently"):
        merged(copies, tmp_path / "run", "merger=soup", labels=("one", "two"))


def test_another_chat_template_is_said_and_the_tuned_models_answers_end_where_theirs_do(copies, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(copies / "two")
    for label, end in (("base", 1), ("one", 2)):
        (copies / label / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    report = merged(copies, tmp_path / "run", "merger=ties", labels=("one", "two"))
    assert "two has another chat template; one's is written" in report.notes
    assert json.loads((report.model_dir / "generation_config.json").read_text())["eos_token_id"] == 2


def test_reward_models_are_merged_with_their_heads(tmp_path):
    save_tiny(tmp_path / "base")
    for seed, label in enumerate("ab"):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        model.save_pretrained(tmp_path / label)
        tiny_tokenizer().save_pretrained(tmp_path / label)
    report = merged(tmp_path, tmp_path / "run", "merger=soup", labels="ab", base=False)
    heads = [weights(tmp_path / label)["score.weight"] for label in "ab"]
    loaded = AutoModelForSequenceClassification.from_pretrained(report.model_dir)
    torch.testing.assert_close(loaded.score.weight.data, (heads[0] + heads[1]) / 2)
    with pytest.raises(ConfigError, match="these are reward models"):
        merged(
            tmp_path,
            tmp_path / "no",
            "merger=soup",
            "+data@tasks.sums=sums_held_out",
            labels="ab",
            base=False,
        )


def test_a_model_without_its_head_is_refused_before_anything_is_merged(copies, tmp_path, monkeypatch):
    given(copies, [*LABELS, "base"], lambda own: own.pop("lm_head.weight"))
    monkeypatch.setattr(
        "luthier_plugins.commands.merge.run.merging.merge_all", lambda *_: pytest.fail("it was merged")
    )
    with pytest.raises(ModelError, match=r"base: lm_head\.weight is missing, which LlamaForCausalLM has"):
        merged(copies, tmp_path / "run", "merger=ties", "check=load")


def test_a_file_that_changed_under_way_is_noticed(copies, tmp_path, monkeypatch):
    def flips(work, *_):
        file = work / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-5000] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr("luthier_plugins.commands.merge.run.merging.write_index", flips)
    with pytest.raises(ModelError, match=r"model\.safetensors: .* reads back differently"):
        merged(copies, tmp_path / "run", "merger=soup")
    assert not (tmp_path / "run").exists()


def test_the_result_is_loaded_and_run_if_asked(copies, tmp_path, monkeypatch):
    assert merged(copies, tmp_path / "sound", "merger=soup", "check=load").tensors
    given(copies, LABELS, lambda own: own["model.norm.weight"].fill_(3e38))
    with pytest.raises(ModelError, match="the merged model's logits are not finite"):
        merged(copies, tmp_path / "run", "merger=soup", "check=load")


def test_a_result_that_could_not_be_loaded_is_refused_beforehand(models, tmp_path, monkeypatch):
    monkeypatch.setattr("luthier_plugins.commands.merge.run.merging.room_for", lambda *_: 2000)
    monkeypatch.setattr(
        "luthier_plugins.commands.merge.run.merging.merge_all", lambda *_: pytest.fail("it was merged")
    )
    with pytest.raises(ConfigError, match=r"check=load takes max_memory=\d+\.\d+, not 0\.05 GiB"):
        merged(models, tmp_path / "run", "merger=soup", "check=load", "max_memory=0.05")


def test_transformers_is_not_imported_for_a_plain_merge(models, tmp_path):
    """Its import takes longer than merging a small model."""
    paths = f"models=[{models / 'one'}, {models / 'two'}]"
    program = (
        "import sys, luthier\n"
        "luthier.merge(luthier.compose('merge', sys.argv[1:]))\n"
        "assert 'transformers' not in sys.modules"
    )
    arguments = [paths, "merger=ties", f"base={models / 'base'}", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run" / "model")


def test_a_refused_merge_leaves_nothing(copies, tmp_path):
    given(copies, ["two"], lambda own: own[UP].fill_(float("inf")))
    with pytest.raises(ModelError, match=rf"models\.two: {UP} has inf"):
        merged(copies, tmp_path / "run", "merger=ties")
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_is_not_finite_is_named(copies, tmp_path):
    file = copies / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"models\.b: .*: {name.removeprefix('base_model.model.')} is not of finite"
    ):
        merged(copies, tmp_path / "run", "merger=soup", labels=("a", "b"), base=False)


def test_a_damaged_config_is_named(copies, tmp_path):
    (copies / "two" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"models\.two: .*config\.json is damaged"):
        merged(copies, tmp_path / "run", "merger=ties")


def test_memory_is_bounded_for_adapters_too(models, tmp_path):
    options = ["merger=soup", "result=adapter", "max_memory=0.05"]
    with pytest.raises(ConfigError, match=r"max_memory=0\.05 GiB is too little"):
        merged(models, tmp_path / "run", *options, labels="abc", base=False)


def test_scores_that_fail_after_the_merge_are_made_up_for(models, tmp_path, monkeypatch):
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    options = ["merger=ties", "+data@tasks.sums=jsonl", f"tasks.sums.path={tmp_path / 'rows.jsonl'}",
               "evaluation.generate=false"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(
            "luthier_plugins.commands.merge.run.merging.task_scores",
            lambda *_: (_ for _ in ()).throw(MemoryError),
        )
        with pytest.raises(MemoryError):
            merged(models, tmp_path / "run", *options)
    before = digest(tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match="another merge's result"):
        merged(models, tmp_path / "run", *options, "merger.density=0.3", "resume=auto")
    monkeypatch.setattr(
        "luthier_plugins.commands.merge.run.merging.merge_all", lambda *_: pytest.fail("it was merged again")
    )
    report = merged(models, tmp_path / "run", *options, "resume=auto")
    assert digest(report.model_dir) == before
    assert set(report.scores) == {"sums"}
    assert len(report.tensors) > 10


def test_rows_that_cannot_be_encoded_are_seen_before_anything_is_merged(models, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "1 + 1 ="}])
    monkeypatch.setattr(
        "luthier_plugins.commands.merge.run.merging.merge_all", lambda *_: pytest.fail("it was merged")
    )
    with pytest.raises(DataError, match=r"tasks\.sums: .*rows\.jsonl:2"):
        merged(models, tmp_path / "run", "merger=soup", "+data@tasks.sums=jsonl",
               f"tasks.sums.path={tmp_path / 'rows.jsonl'}")  # fmt: skip


def test_large_numbers_do_not_overflow_the_report(copies, tmp_path):
    given(copies, [*LABELS, "base"], lambda own: own[UP].mul_(1e20))
    report = merged(copies, tmp_path / "run", "merger=soup")
    told = {one.name: one.change for one in report.tensors}[UP]
    own = [weights(copies / label)[UP].double() for label in LABELS]
    first = sorted(zip(LABELS, own, strict=True))[0][1]
    expected = (sum(own) / 3 - first).norm() / first.norm()
    assert told == pytest.approx(float(expected), rel=1e-3)


def test_names_of_tensors_stand_whole_on_a_line_of_80_columns(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["model.layers.10.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight"]
    tensors = tuple(MergedTensor(name, 0.0123, 0.31, 0.00012, 0.0456) for name in names)
    show_merge(MergeReport(tmp_path, {"name": "ties"}, {"a": "a"}, None, "model", tensors))
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert set(names) <= set(lines)


def tiny_mixtral(seed):
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
def test_a_family_that_is_stored_in_other_pieces_is_merged_and_checked(tmp_path, old):
    """mergekit#692: on disk a Mixtral has a tensor an expert, in memory one of all; old files have more."""
    for seed, label in enumerate("ab"):
        tiny_mixtral(seed).save_pretrained(tmp_path / label)
        tiny_tokenizer().save_pretrained(tmp_path / label)
        tensors = weights(tmp_path / label)
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in tensors
        if old:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
            save_file(tensors, tmp_path / label / "model.safetensors", metadata={"format": "pt"})
    models = f"models={{a: {tmp_path / 'a'}, b: {tmp_path / 'b'}}}"
    report = merge(compose("merge", [models, f"run_dir={tmp_path / 'run'}", "merger=soup", "check=load"]))
    one, other, result = (
        MixtralForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "a", tmp_path / "b", report.model_dir)
    )
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    for label in "ab":
        save_file(tensors, tmp_path / label / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.1.\S+ is missing, which MixtralForCausalLM has"):
        merge(compose("merge", [models, f"run_dir={tmp_path / 'other'}", "merger=soup", "check=load"]))
