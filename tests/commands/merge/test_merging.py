"""`merge`: the numbers, the bytes, the rules, the refusals, and going on after a kill."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from helpers import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from luthier import ConfigError, ModelError, compose
from luthier.registry import command
from luthier_plugins.commands.merge import merge
from luthier_plugins.commands.merge.io.weight_files import open_checkpoint
from luthier_plugins.commands.merge.run.tensor import merge_tensor

pytestmark = pytest.mark.slow

LABELS = ("one", "two", "three")
UP = "model.layers.0.mlp.up_proj.weight"


def tuned(folder, base, seed, dtype=torch.float32, **save):
    """Save the model of `base`, its weights moved a little."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn(one.shape, generator=generator).to(dtype))
    model.save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def base_and_tuned(root):
    """Save a base and three models tuned from it."""
    save_tiny(root / "base", hidden_size=64, intermediate_size=96)
    for seed, label in enumerate(LABELS, 1):
        tuned(root / label, root / "base", seed)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return base_and_tuned(tmp_path_factory.mktemp("models"))


def merged(root, run_dir, *more, labels=LABELS, base=True):
    paths = ", ".join(f"{label}: {root / label}" for label in labels)
    options = [f"base={root / 'base'}"] if base else []
    return merge(compose("merge", [f"models={{{paths}}}", *options, f"run_dir={run_dir}", *more]))


def weights(folder) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder, its shards together."""
    return {
        name: one
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, one in load_file(file).items()
    }


def digest(folder) -> str:
    """Return what tells the tensors of a folder from any others, bit by bit."""
    found = hashlib.sha256()
    for name, one in sorted(weights(folder).items()):
        found.update(name.encode() + one.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trimmed(delta, k):
    """Keep the k largest, the first of equals first."""
    order = delta.abs().flatten().sort(descending=True, stable=True).indices[:k]
    kept = torch.zeros(delta.numel())
    kept[order] = delta.flatten()[order]
    return kept.view(delta.shape)


def elected(deltas):
    """TIES' last two steps, element by element in plain Python."""
    rows = torch.stack([one.flatten() for one in deltas]).T.tolist()
    found = []
    for row in rows:
        sign = 1 if sum(row) >= 0 else -1
        agreeing = [one for one in row if one * sign > 0]
        found.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(found).view(deltas[0].shape)


def test_a_soup_is_the_mean_and_loads_everywhere(models, tmp_path):
    report = merged(models, tmp_path / "run", "merger=soup", "+merger.weights.two=2", base=False)
    own = [weights(models / label) for label in LABELS]
    found = weights(report.model_dir)
    for name, tensor in found.items():
        expected = (own[0][name].double() + 2 * own[1][name].double() + own[2][name].double()) / 4
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(report.model_dir)
    assert torch.equal(model.get_parameter(UP), found[UP])
    assert AutoTokenizer.from_pretrained(report.model_dir)("12 + 7").input_ids
    card = (report.model_dir / "README.md").read_text()
    file = models / "two" / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert '"two": 2' in card
    assert json.loads((report.model_dir / "merge.json").read_text())["merger"]["name"] == "soup"
    assert (report.model_dir / "generation_config.json").is_file()


@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_ties_is_what_the_paper_says(models, tmp_path, trim):
    report = merged(models, tmp_path / "run", "merger=ties", "merger.density=0.3", "merger.scaling=0.7",
                    f"merger.trim={trim}")  # fmt: skip
    base, found = weights(models / "base"), weights(report.model_dir)
    deltas = [{name: one - base[name] for name, one in weights(models / label).items()} for label in LABELS]
    if trim == "tensor":
        kept = [{name: trimmed(one, int(0.3 * one.numel())) for name, one in own.items()} for own in deltas]
    else:
        kept = []
        for own in deltas:
            flat = torch.cat([own[name].flatten() for name in sorted(own)])
            whole = trimmed(flat, int(0.3 * len(flat)))
            parts = whole.split([own[name].numel() for name in sorted(own)])
            kept.append(
                {name: part.view(own[name].shape) for name, part in zip(sorted(own), parts, strict=True)}
            )
    for name, tensor in found.items():
        expected = base[name] + 0.7 * elected([own[name] for own in kept])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["merger=soup", "merger=task_arithmetic", "merger=ties", "merger=dare"])
def test_a_model_merged_with_itself_is_itself_to_the_bit(models, tmp_path, method):
    shutil.copytree(models / "one", tmp_path / "a")
    for label in ("b", "c", "base"):
        shutil.copytree(models / "one", tmp_path / label)
    report = merged(tmp_path, tmp_path / "run", method, labels=("a", "b", "c"))
    assert digest(report.model_dir) == digest(models / "one")


METHODS = [
    ["merger=soup"],
    ["merger=ties"],
    ["merger=ties", "merger.trim=model"],
    ["merger=dare", "merger.drop=0.5"],
    ["merger=dare", "merger.then=ties"],
]


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_shards_threads_order_and_memory_are_without_effect(models, tmp_path, method, monkeypatch):
    expected = digest(merged(models, tmp_path / "plain", *method, "threads=1").model_dir)
    for label in (*LABELS, "base"):
        model = AutoModelForCausalLM.from_pretrained(models / label)
        model.save_pretrained(tmp_path / "sharded" / label, max_shard_size="40KB")
        tiny_tokenizer().save_pretrained(tmp_path / "sharded" / label)
    assert len(list((tmp_path / "sharded/one").glob("*.safetensors"))) > 3
    monkeypatch.setattr("luthier_plugins.commands.merge.run.tensor.RUN", 1000)
    monkeypatch.setattr("luthier_plugins.mergers.ties.top_k.ROOM", 500)
    monkeypatch.setattr("luthier_plugins.commands.merge.run.merging.room_for", lambda *_: 2000)
    backwards = LABELS[::-1]
    report = merged(
        tmp_path / "sharded", tmp_path / "other", *method, "threads=3", "shard_gb=1e-5", labels=backwards
    )
    assert len(list(report.model_dir.glob("*.safetensors"))) > 3
    assert digest(report.model_dir) == expected
    model = AutoModelForCausalLM.from_pretrained(report.model_dir)
    assert model.get_parameter(UP).shape == (96, 64)


def test_dare_is_unbiased(models, tmp_path):
    """The mean over many seeds comes to the dense mean, as the square root of their number."""
    from luthier.config.building import build_method
    from luthier.contracts.merger import Group

    base = weights(models / "base")[UP]
    own = tuple(weights(models / label)[UP] for label in LABELS)
    dense = torch.stack([one - base for one in own]).mean(0)
    total = torch.zeros_like(base)
    for seed in range(200):
        dare = build_method("merger", {"name": "dare", "drop": 0.8, "seed": seed})
        total += dare.merge(Group(UP, LABELS, own, base)) - base
    # An element's deviation is |τ|·√(p/(1−p)) a draw; of three models and 200 seeds together:
    deviation = sum((one - base).square() for one in own).sqrt() / 3 * (0.8 / 0.2 / 200) ** 0.5
    scores = (total / 200 - dense) / deviation
    assert abs(float(scores.mean())) < 0.05
    assert abs(float(scores.std()) - 1) < 0.05


def test_dare_with_another_seed_is_another_model(models, tmp_path):
    one = merged(models, tmp_path / "a", "merger=dare", "merger.seed=1")
    other = merged(models, tmp_path / "b", "merger=dare", "merger.seed=2")
    assert digest(one.model_dir) != digest(other.model_dir)


def test_the_dtype_is_chosen_and_its_rounding_told(models, tmp_path):
    exact = merged(models, tmp_path / "exact", "merger=soup", base=False)
    report = merged(models, tmp_path / "run", "merger=soup", "dtype=bfloat16", base=False)
    found, expected = weights(report.model_dir), weights(exact.model_dir)
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    told = {one.name: one for one in report.tensors}[UP]
    rounding = (found[UP].float() - expected[UP]).norm() / expected[UP].norm()
    assert told.rounding == pytest.approx(float(rounding), rel=1e-3)
    change = (expected[UP] - weights(models / "one")[UP]).norm()  # from the first label, alphabetically
    assert told.change == pytest.approx(float(change / weights(models / "one")[UP].norm()), rel=1e-3)
    assert json.loads((report.model_dir / "config.json").read_text())["dtype"] == "bfloat16"
    assert exact.tensors[0].rounding == 0.0


def test_signs_in_conflict_are_counted(models, tmp_path):
    report = merged(models, tmp_path / "run", "merger=ties")
    base = weights(models / "base")[UP]
    deltas = torch.stack([weights(models / label)[UP] - base for label in LABELS])
    share = ((deltas > 0).any(0) & (deltas < 0).any(0)).float().mean()
    assert {one.name: one for one in report.tensors}[UP].conflicts == pytest.approx(float(share))


def edited(models, tmp_path, change):
    """Copy the models, and let `change` edit the tensors of the second."""
    root = tmp_path / "edited"
    shutil.copytree(models, root)
    tensors = weights(root / "two")
    change(tensors)
    save_file(tensors, root / "two" / "model.safetensors", metadata={"format": "pt"})
    return root


def test_a_tensor_that_one_lacks_is_refused_or_goes_by_the_rule(models, tmp_path):
    root = edited(models, tmp_path, lambda tensors: tensors.pop(UP))
    with pytest.raises(ModelError, match=rf"{UP} is not in models\.two; missing=present"):
        merged(root, tmp_path / "run", "merger=task_arithmetic")
    base = weights(models / "base")[UP]
    report = merged(root, tmp_path / "run", "merger=task_arithmetic", "missing=present")
    expected = base + sum(weights(models / label)[UP] - base for label in ("one", "three"))
    torch.testing.assert_close(weights(report.model_dir)[UP], expected, rtol=0, atol=1e-6)
    assert any(UP in note for note in report.notes)
    report = merged(root, tmp_path / "other", "merger=task_arithmetic", "missing=base")
    assert torch.equal(weights(report.model_dir)[UP], base)


def test_whole_numbers_are_copied_and_must_agree(models, tmp_path):
    steps = {label: torch.tensor([3, 4]) for label in (*LABELS, "base")}

    def with_steps(root):
        for label, own in steps.items():
            tensors = weights(models / label) | {"model.steps": own}
            save_file(tensors, root / label / "model.safetensors", metadata={"format": "pt"})
        return root

    shutil.copytree(models, tmp_path / "equal")
    report = merged(with_steps(tmp_path / "equal"), tmp_path / "run", "merger=ties")
    assert weights(report.model_dir)["model.steps"].tolist() == [3, 4]
    steps["three"] = torch.tensor([3, 5])
    shutil.copytree(models, tmp_path / "unequal")
    with pytest.raises(
        ModelError, match=r"model\.steps counts in whole numbers and differs between one and three"
    ):
        merged(with_steps(tmp_path / "unequal"), tmp_path / "other", "merger=ties")


def test_tied_weights_are_written_once(tmp_path):
    save_tiny(tmp_path / "base", tie_word_embeddings=True)
    for seed, label in enumerate(LABELS, 1):
        tuned(tmp_path / label, tmp_path / "base", seed)
    tensors = weights(tmp_path / "two")
    assert "lm_head.weight" not in tensors
    # Some programs write the copy too.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "two" / "model.safetensors", metadata={"format": "pt"})
    report = merged(tmp_path, tmp_path / "run", "merger=ties")
    assert "lm_head.weight" not in weights(report.model_dir)
    assert any("lm_head.weight" in note for note in report.notes)


@pytest.mark.parametrize("missing", ["refuse", "present"])
@pytest.mark.parametrize("order", [("tied", "own"), ("own", "tied"), ("own", "tied", "copy")], ids=str)
@pytest.mark.parametrize("says", [True, False])
def test_where_some_heads_are_the_embedding_the_heads_in_use_are_merged(tmp_path, order, missing, says):
    """mergekit#464: the head of one model alone, under a config that ties it to another, is nobody's."""
    save_tiny(tmp_path / "tied", seed=1, tie_word_embeddings=True)
    save_tiny(tmp_path / "copy", seed=2, tie_word_embeddings=True)
    tensors = weights(tmp_path / "copy")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    save_tiny(tmp_path / "own", seed=3, tie_word_embeddings=False)
    # transformers ties nothing where what is stored differs, so a config that says otherwise means nothing.
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": says}))
    models = ", ".join(f"{label}: {tmp_path / label}" for label in order)
    given = [f"models={{{models}}}", f"run_dir={tmp_path / 'run'}", "merger=soup", f"missing={missing}"]
    report = merge(compose("merge", [*given, "check=load"]))
    heads, embeddings = [], []
    for label in order:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / label)
        heads.append(model.get_output_embeddings().weight)
        embeddings.append(model.get_input_embeddings().weight)
    assert json.loads((report.model_dir / "config.json").read_text())["tie_word_embeddings"] is False
    result = AutoModelForCausalLM.from_pretrained(report.model_dir)
    torch.testing.assert_close(result.get_output_embeddings().weight, torch.stack(heads).mean(0))
    torch.testing.assert_close(result.get_input_embeddings().weight, torch.stack(embeddings).mean(0))
    assert any("the result has one of its own" in note for note in report.notes)


def test_a_head_that_is_lost_is_not_taken_for_a_tied_one(tmp_path):
    """Llama's heads are their own unless a config says otherwise, and some configs say nothing."""
    for seed, label in enumerate(("own", "lost"), 1):
        save_tiny(tmp_path / label, seed=seed, tie_word_embeddings=False)
    tensors = weights(tmp_path / "lost")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "lost" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "lost" / "config.json").read_text())
    models = f"models={{own: {tmp_path / 'own'}, lost: {tmp_path / 'lost'}}}"
    for said in ({"tie_word_embeddings": False}, {}):
        silent = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
        (tmp_path / "lost" / "config.json").write_text(json.dumps(silent | said))
        with pytest.raises(ModelError, match=r"lm_head.weight is not in models.lost"):
            merge(compose("merge", [models, f"run_dir={tmp_path / 'run'}", "merger=soup"]))


def test_other_shapes_are_refused_by_name(models, tmp_path):
    root = tmp_path / "models"
    shutil.copytree(models, root)
    save_tiny(root / "two", hidden_size=64, intermediate_size=80)
    with pytest.raises(
        ModelError, match=r"is \[96, 64\] in base and \[80, 64\] in two|is \[64, 96\] in base"
    ):
        merged(root, tmp_path / "run", "merger=ties")
    tiny_llama(vocab_size=400, hidden_size=64, intermediate_size=96).save_pretrained(root / "two")
    with pytest.raises(ModelError, match=r"vocabularies of \d+ and 400 tokens"):
        merged(root, tmp_path / "run", "merger=ties")
    assert not (tmp_path / "run").exists()


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    next(folder.glob("model-00002*.safetensors")).unlink()


def pickled(folder):
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def not_finite(folder):
    tensors = weights(folder)
    tensors[UP][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantised(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (cut_short, r"models\.two: .*model\.safetensors is truncated: .* ends at byte \d+ of \d+"),
        (
            without_a_shard,
            r"models\.two: .* lacks model-00002-of-\d+\.safetensors, named by model\.safetensors\.index",
        ),
        (pickled, r"models\.two: .* holds pickled weights, .* convert it: python -c"),
        (not_finite, rf"models\.two: {UP} has nan at element {3 * 64 + 5} of \[96, 64\]"),
        (quantised, r"models\.two: .* is quantised; merge its original"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_harmed_model_is_named(models, tmp_path, harm, told):
    shutil.copytree(models, tmp_path / "models")
    harm(tmp_path / "models" / "two")
    with pytest.raises(ModelError, match=told):
        merged(tmp_path / "models", tmp_path / "run", "merger=ties")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["merger=soup", "models=???"], r"models must be set: '\[FOLDER"),
        (["merger=ties", "base=null"], r"merger=ties works on differences .* set base=MODEL"),
        (["merger=soup", "+merger.weights.tow=1"], r"merger\.weights: .*'tow'.*two"),
        (["merger=soup", "+merger.weights={one: 1, two: -1, three: 0}"], r"add up to 0"),
        (["merger=ties", "merger.density=0"], r"merger\.density=0\.0 must be in \(0, 1\]"),
        (["merger=dare", "merger.drop=1"], r"merger\.drop=1\.0 must be in \[0, 1\)"),
        (["merger=ties", "max_memory=0.1"], r"max_memory=0\.1 GiB is too little: .* set max_memory="),
        (["merger=ties", "missing=some"], r"missing 'some'"),
        (["merger=ties", "rank=8"], r"rank=8 is of an adapter; set result=adapter"),
        (["merger=ties", "result=adapter", "rank=8"], r"models\.one is a whole model; result=adapter"),
        (["merger=soup", "greedy=true"], r"greedy=true needs held-out tasks"),
        (["merger=ties", "+merger.weights.two=-1"], r"merger\.weights\.two=-1\.0 must not be negative"),
        (["merger=dare", "merger.then=ties", "+merger.weights.two=-1"], r"must not be negative"),
        (["merger=soup", "missing=base"], r"missing=base: merger=soup looks at no base"),
        (["merger=soup", "max_memory=inf"], r"max_memory=inf must be positive and finite"),
        (["merger=soup", "resume=yes"], r"resume=yes: expected auto"),
        (["merger=soup", "result=adapter", "dtype=float16"], r"dtype=float16 is of a whole model"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(models, tmp_path, options, told):
    with pytest.raises((ConfigError, ModelError), match=told):
        merged(models, tmp_path / "run", *options)
    assert not (tmp_path / "run" / "model").exists()


def test_a_full_disk_is_seen_beforehand(models, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"the disk has room for 0\.000 GB"):
        merged(models, tmp_path / "run", "merger=ties")


def test_a_finished_merge_is_not_written_over(models, tmp_path):
    report = merged(models, tmp_path / "run", "merger=ties")
    before = digest(report.model_dir)
    with pytest.raises(ConfigError, match="holds a run or a model already"):
        merged(models, tmp_path / "run", "merger=soup")
    with pytest.raises(ConfigError, match="holds another merge's result; choose another run_dir"):
        merged(models, tmp_path / "run", "merger=soup", "resume=auto")
    again = merged(models, tmp_path / "run", "merger=ties", "resume=auto")
    assert (again.tensors, again.seconds) == (report.tensors, report.seconds)
    assert digest(report.model_dir) == before


def test_two_folders_of_one_name_need_labels(models, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copytree(models / "one", tmp_path / "other" / "one")
    paths = f"[{models / 'one'},{tmp_path / 'other' / 'one'}]"
    with pytest.raises(ConfigError, match="would both be called one; give them names"):
        merge(compose("merge", [f"models={paths}", "merger=soup", f"run_dir={tmp_path / 'run'}"]))


@pytest.mark.parametrize("method", [["merger=dare", "merger.drop=0.5"], ["merger=ties", "merger.trim=model"]])
def test_an_interrupted_merge_goes_on(models, tmp_path, monkeypatch, method):
    expected = digest(merged(models, tmp_path / "whole", *method).model_dir)
    done: list[str] = []

    def dies(job, *rest):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(job.name)
        return merge_tensor(job, *rest)

    monkeypatch.setattr("luthier_plugins.commands.merge.run.pool.merge_tensor", dies)
    with pytest.raises(KeyboardInterrupt):
        merged(models, tmp_path / "run", *method, "threads=1")
    assert not (tmp_path / "run" / "model").exists()
    again: list[str] = []

    def counts(job, *rest):
        again.append(job.name)
        return merge_tensor(job, *rest)

    monkeypatch.setattr("luthier_plugins.commands.merge.run.pool.merge_tensor", counts)
    report = merged(models, tmp_path / "run", *method, "threads=1", "resume=auto")
    assert digest(report.model_dir) == expected
    assert not set(done) & set(again)
    assert len(done) + len(again) == len(report.tensors)
    assert not list(report.model_dir.glob(".*"))


def test_what_another_merge_left_is_begun_anew(models, tmp_path, monkeypatch):
    expected = digest(merged(models, tmp_path / "whole", "merger=soup").model_dir)
    with monkeypatch.context() as patch:
        patch.setattr(
            "luthier_plugins.commands.merge.run.merging.read_back",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            merged(models, tmp_path / "run", "merger=ties")
    report = merged(models, tmp_path / "run", "merger=soup", "resume=auto")
    assert digest(report.model_dir) == expected


def test_a_result_that_transformers_would_not_find_whole_is_refused(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    for label in (*LABELS, "base"):
        tensors = weights(models / label)
        del tensors[UP]
        save_file(tensors, tmp_path / "models" / label / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{UP} is missing"):
        merged(tmp_path / "models", tmp_path / "run", "merger=ties", "check=load")


def test_any_run_of_elements_is_read(models):
    checkpoint = open_checkpoint(models / "one")
    expected = weights(models / "one")[UP].flatten()
    assert torch.equal(checkpoint.read(UP, 17, 4001), expected[17:4001])
    assert torch.equal(checkpoint.read(UP), expected)
    checkpoint.close()


def test_the_command_line_merges(models, tmp_path, capsys):
    from luthier.commands.cli import dispatch

    arguments = [f"models=[{models}/one,{models}/two]", "merger=soup", f"run_dir={tmp_path / 'run'}"]
    assert dispatch(["merge", *arguments]) == 0
    said = capsys.readouterr().out
    assert "tensors of one, two merged by soup" in said
    assert f"model: {tmp_path / 'run' / 'model'}" in said
    assert luthier.merge.__self__ == command("merge")


def test_the_result_is_scored_on_tasks(models, tmp_path):
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
    )
    without = "evaluation.generate=false"
    tasks = [f"+data@tasks.{task}=jsonl" for task in ("sums", "others")]
    tasks += [f"tasks.{task}.path={tmp_path / 'rows.jsonl'}" for task in ("sums", "others")]
    report = merged(models, tmp_path / "run", "merger=soup", *tasks, without)
    options = [
        "data=jsonl",
        f"data.path={tmp_path / 'rows.jsonl'}",
        f"run_dir={tmp_path / 'evaluated'}",
        without,
    ]
    score = -luthier.evaluate(compose("evaluate", [f"model.path={report.model_dir}", *options])).loss
    assert report.scores == {task: pytest.approx(score) for task in ("sums", "others")}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["scores"] == report.scores
    with pytest.raises(ConfigError, match=r"tasks\.sums: path=nowhere\.jsonl"):
        merged(
            models, tmp_path / "no", "merger=soup", "+data@tasks.sums=jsonl", "tasks.sums.path=nowhere.jsonl"
        )
    assert not (tmp_path / "no").exists()  # seen before anything is merged


def test_a_greedy_soup_leaves_out_what_does_not_help(models, tmp_path, monkeypatch):
    """Scored by how near a tensor is to that of two of the models together, which the best one is not yet."""
    goal = (weights(models / "one")[UP] + weights(models / "three")[UP]) / 2
    asked = []

    def scores(config, folder):
        asked.append(Path(folder))
        return {"near": -float((weights(folder)[UP] - goal).norm()), "same": 1.0}

    monkeypatch.setattr("luthier_plugins.commands.merge.run.greedy.task_scores", scores)
    monkeypatch.setattr("luthier_plugins.commands.merge.run.merging.task_scores", scores)
    monkeypatch.setattr("luthier_plugins.commands.merge.run.merging.check_tasks", lambda *_: None)
    report = merged(models, tmp_path / "run", "merger=soup", "greedy=true", "+data@tasks.near=jsonl",
                    "tasks.near.path=rows.jsonl")  # fmt: skip
    torch.testing.assert_close(weights(report.model_dir)[UP], goal, rtol=0, atol=1e-6)
    assert list(report.models) == ["one", "three"]
    assert report.left_out == ("two",)
    assert len(asked) == 3 + 2 + 1  # every model alone, every larger merge, the result
    assert not list((tmp_path / "run").glob("greedy*"))
