"""A checkpoint that lacks a tensor, has one too many, or another model's is refused wherever it is read."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from helpers import save_tiny, tiny_tokenizer, write_rows
from luthier import ModelError, compose, evaluate, train
from luthier.config import ModelConfig
from luthier.models import load_model, load_whole
from luthier_plugins.commands.fold.folding import fold
from luthier_plugins.commands.sample.sampling import sample
from luthier_toolkits.saving import save_model

FIRST = "lm_head.weight, model.embed_tokens.weight, …"


@pytest.fixture
def base(tmp_path):
    save_tiny(tmp_path / "base")
    return tmp_path / "base"


def rewrite(folder, change):
    """Save the weights of `folder` again as `change` returns them."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder, **options):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))


def load(folder, **options):
    return load_model(
        ModelConfig(path=str(folder), dtype="float32", device="cpu", **options), train_base=False
    )


def shards(folder, without=()):
    """Save the weights of `folder` in two shards, which lack the tensors `without`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{place % 2}.safetensors" for place, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == file and name not in without}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def another(tensors):
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=300)).state_dict()


NORM = "model.norm.weight"
DAMAGES = {
    "A6 one of 21 tensors": (
        lambda folder: rewrite(folder, lambda tensors: {NORM: tensors[NORM]}),
        rf"tensors missing: 20 \({FIRST}\); expected all tensors of LlamaForCausalLM",
    ),
    "A6 another architecture's file": (
        lambda folder: rewrite(folder, another),
        r"tensors missing: 20 \(.*\), tensors unexpected: 16 \(.*\), tensors of another shape: 1 \(lm_head",
    ),
    "one is missing": (
        lambda folder: rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != NORM}),
        r"tensors missing: 1 \(model.norm.weight\); expected",
    ),
    "one too many": (
        lambda folder: rewrite(folder, lambda tensors: {**tensors, "model.gate.weight": torch.ones(3)}),
        r"tensors unexpected: 1 \(model.gate.weight\); expected",
    ),
    "another shape": (
        lambda folder: rewrite(folder, lambda tensors: {**tensors, NORM: torch.ones(3)}),
        r"tensors of another shape: 1 \(model.norm.weight\); expected",
    ),
    "the config has more layers": (
        lambda folder: configure(folder, num_hidden_layers=5),
        r"tensors missing: 27 \(model.layers.2.input_layernorm.weight, .*\); expected",
    ),
    "the config has fewer layers": (
        lambda folder: configure(folder, num_hidden_layers=1),
        r"tensors unexpected: 9 \(model.layers.1.input_layernorm.weight, ",
    ),
    "the config has biases": (
        lambda folder: configure(folder, attention_bias=True),
        r"tensors missing: 8 \(model.layers.0.self_attn.k_proj.bias",
    ),
    "the config unties the head": (
        lambda folder: (
            configure(folder, tie_word_embeddings=False),
            rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"}),
        ),
        r"tensors missing: 1 \(lm_head.weight\)",
    ),
    "a shard lacks one that the index names": (
        lambda folder: shards(folder, without=[NORM]),
        r"tensors missing: 1 \(model.norm.weight\)",
    ),
    "a wide layer": (
        lambda folder: configure(folder, intermediate_size=10**13),
        r"tensors of another shape: 6 \(model.layers.0.mlp.down_proj.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_that_are_not_whole_are_refused(base, damage):
    do, told = DAMAGES[damage]
    do(base)
    with pytest.raises(ModelError, match=told) as error:
        load(base)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_every_command_refuses_them(base, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 2
    write_rows(tmp_path / "rows.jsonl", rows)
    data = ["data=jsonl", f"data.path={tmp_path}/rows.jsonl", f"model.path={base}", "model.dtype=float32"]
    train(compose("train", [*data, "adapter=lora", "epochs=1", f"run_dir={tmp_path}/adapter", "tracker=[]"]))
    rewrite(base, lambda tensors: {NORM: tensors[NORM]})
    for run, config in (
        (train, compose("train", [*data, f"run_dir={tmp_path}/train"])),
        (evaluate, compose("evaluate", [*data, f"run_dir={tmp_path}/evaluate"])),
        (sample, compose("sample", [*data, f"out={tmp_path}/sample.jsonl"])),
        (fold, compose("fold", [f"model.path={tmp_path}/adapter", f"out={tmp_path}/folded"])),
    ):
        with pytest.raises(ModelError, match=r"tensors missing: 20"):
            run(config)


def test_what_transformers_calls_ignorable_passes(base):
    """Old Llama checkpoints keep a table of frequencies in every layer."""
    expected = load(base).model.state_dict()
    inverse = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    rewrite(base, lambda tensors: {**tensors, **inverse})
    assert all(torch.equal(expected[name], tensor) for name, tensor in load(base).model.state_dict().items())


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    load(tmp_path / "tied")
    rewrite(
        tmp_path / "tied",
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]},
    )
    load(tmp_path / "tied")


def test_a_gpt2_whose_names_lack_their_prefix_passes(tmp_path):
    """So is the checkpoint of GPT-2 itself, with the masks of old."""
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=300))
    save_model(model, tiny_tokenizer(), tmp_path / "gpt2")
    mask = {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    rewrite(
        tmp_path / "gpt2",
        lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()} | mask,
    )
    assert torch.equal(load(tmp_path / "gpt2").model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_lacks_the_head_of_a_language_model_and_says_so(base, tmp_path, tied):
    """transformers would draw that head, and answers and losses would come from it."""
    config = tf.AutoConfig.from_pretrained(base, num_labels=1, tie_word_embeddings=tied)
    judge = tf.AutoModelForSequenceClassification.from_config(config)
    judge.save_pretrained(base)
    load(base)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    data = ["data=jsonl", f"data.path={tmp_path}/rows.jsonl", f"model.path={base}", "model.dtype=float32"]
    for run, arguments in (
        (train, compose("train", [*data, f"run_dir={tmp_path}/train", "epochs=1", "tracker=[]"])),
        (evaluate, compose("evaluate", [*data, f"run_dir={tmp_path}/evaluate", "tracker=[]"])),
        (sample, compose("sample", [*data, f"out={tmp_path}/out.jsonl", "max_new_tokens=2"])),
    ):
        if tied:
            run(arguments)
        else:
            with pytest.raises(ModelError, match="is a reward model and has no output head"):
                run(arguments)
    rewrite(base, lambda tensors: {k: v for k, v in tensors.items() if k != NORM})
    with pytest.raises(ModelError, match=r"tensors missing: 1 \(model.norm.weight\)"):
        load(base)


def test_the_check_knows_shapes_before_weights(base, monkeypatch):
    """What is refused was never allocated."""
    devices = []
    original = tf.LlamaForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        tf.LlamaForCausalLM,
        "from_pretrained",
        classmethod(lambda cls, *a, **o: (devices.append(o["device_map"][""]), original(cls, *a, **o))[1]),
    )
    options = {"device_map": {"": "cpu"}, "dtype": torch.float32}
    load_whole(tf.LlamaForCausalLM, str(base), **options)
    rewrite(base, lambda tensors: {NORM: tensors[NORM]})
    with pytest.raises(ModelError, match="tensors missing"):
        load_whole(tf.LlamaForCausalLM, str(base), **options)
    assert devices == ["meta", "cpu", "meta"]
