"""Damaged files of a checkpoint: it loads as if whole, or is refused in one line; no third thing happens."""

import copy
import json
import shutil

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from helpers import save_tiny, tiny_tokenizer
from luthier import LuthierError, ModelError
from luthier.config import ModelConfig
from luthier.models import load_model, load_model_tokenizer
from luthier.policy import policy_of

MANY = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TEXT = "naïve a b 12 <|im_start|>user\n"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "base"
    save_tiny(folder, num_hidden_layers=1)
    return folder


def loaded(folder):
    """What a person has of it: logits, ids, prompts, end tokens, context."""
    whole = load_model(ModelConfig(path=str(folder), dtype="float32", device="cpu"), train_base=False)
    with torch.no_grad():
        logits = whole.model(torch.arange(3, 15)[None]).logits
    ends = whole.model.generation_config.eos_token_id
    return logits.tolist(), ends, whole.context, *text_of(whole.tokenizer)


def tokenized(folder):
    return text_of(load_model_tokenizer(ModelConfig(path=str(folder))).tokenizer)


def text_of(tokenizer):
    chat = [{"role": "user", "content": "hi"}]
    return (
        tokenizer(TEXT)["input_ids"],
        tokenizer.apply_chat_template(chat, tokenize=False),
        tokenizer.eos_token_id,
    )


def check(base, name, content, read=loaded):
    """Put `content` in the place of the file `name`, and see that the property holds."""
    expected = whole(base, read)
    folder = base.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    (folder / name).write_bytes(content)
    try:
        result = read(folder)
    except LuthierError as error:
        result = expected if "\n" not in str(error) else error
    assert result == expected


READ = {}


def whole(base, read):
    key = base, read
    if key not in READ:
        READ[key] = read(base)
    return READ[key]


def places(value, path=()):
    """Every place in a JSON value, the whole first."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(len(value), 3)):
            yield from places(value[key], (*path, key))


def with_value(value, path, new):
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def at(value, path):
    for key in path:
        value = value[key]
    return value


def of_another_type(data, table):
    """A table of which one value is of another type; that one lacks an option or has no end is no damage."""
    path = data.draw(st.sampled_from(list(places(table))))
    old = at(table, path)
    kinds = (int, float) if isinstance(old, float) else type(old)
    new = data.draw(VALUES.filter(lambda new: not isinstance(new, kinds)))
    ends = new is None or (isinstance(new, list) and all(type(end) is int for end in new))
    return table if ends and path == ("eos_token_id",) else with_value(table, path, new)


def damaged_json(data, file):
    """The content of `file` cut short, replaced by noise, or with a value of another type."""
    content = file.read_bytes()
    how = data.draw(st.sampled_from(["cut", "noise", "type", "type", "type", "type"]))
    if how == "cut":
        return content[: data.draw(st.integers(0, len(content) - 3))]
    return (
        data.draw(st.binary())
        if how == "noise"
        else json.dumps(of_another_type(data, json.loads(content))).encode()
    )


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_configs(base, name):
    @MANY
    @given(st.data())
    def run(data):
        check(base, name, damaged_json(data, base / name))

    run()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(base, name):
    @MANY
    @given(st.data())
    def run(data):
        check(base, name, damaged_json(data, base / name), read=tokenized)

    run()


def header_of(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def damaged_weights(data, content):
    """Weights cut short, noise, a bit of the header turned, or a value of the header replaced."""
    header, rest = header_of(content)
    how = data.draw(st.sampled_from(["cut", "noise", "longer", "bit", "bit", "type", "type", "dtype"]))
    if how == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    if how == "noise":
        return data.draw(st.binary())
    if how == "longer":
        return content + data.draw(st.binary(min_size=1))
    if how == "bit":
        place = data.draw(st.integers(0, len(content) - len(rest) - 1))
        turned = content[place] ^ 1 << data.draw(st.integers(0, 7))
        return content[:place] + bytes([turned]) + content[place + 1 :]
    if how == "type":
        return with_header(of_another_type(data, header), rest)
    name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    dtype = data.draw(
        st.sampled_from(["I8", "U8", "I16", "F16", "BF16", "I32", "U32", "F64", "I64", "BOOL", "F33"])
    )
    return with_header(with_value(header, (name, "dtype"), dtype), rest)


def test_weights(base):
    content = (base / "model.safetensors").read_bytes()

    @MANY
    @given(st.data())
    def run(data):
        check(base, "model.safetensors", damaged_weights(data, content))

    run()


@pytest.fixture(scope="module")
def sharded(base):
    folder = base.with_name("sharded")
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{place % 2}.safetensors" for place, name in enumerate(tensors)}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards(sharded):
    content = (sharded / "model-1.safetensors").read_bytes()

    @MANY
    @given(st.data())
    def run(data):
        if data.draw(st.booleans()):
            name = "model.safetensors.index.json"
            check(sharded, name, damaged_json(data, sharded / name))
        else:
            check(sharded, "model-1.safetensors", damaged_weights(data, content))

    run()


# What the property does not reach: values of the right type


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000; no model has more than 2048"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers=1000000000000000; no model"),
        ({"num_labels": 10**9}, "num_labels=1000000000; no model has more than 2048"),
        ({"text_config": {"num_experts": 10**9}}, "num_experts=1000000000; no model has more"),
        ({"num_attention_heads": 0, "head_dim": None}, "transformers cannot use it"),
        ({"num_attention_heads": -1}, "transformers cannot use it"),
        ({"num_key_value_heads": 0}, "transformers cannot use it|another shape"),
        ({"hidden_size": -8}, "transformers cannot use it"),
        ({"vocab_size": -1}, "transformers cannot use it"),
        ({"hidden_size": 0}, "transformers cannot use it|another shape"),
        ({"model_type": None}, "transformers cannot use it"),
        ({"model_type": "lama"}, "transformers cannot use it|needs code"),
        ({"quantization_config": "nf4"}, "is damaged: expected a table"),
        ({"quantization_config": [1]}, "is damaged: expected a table"),
        ({"vocab_size": 10**15}, "of another shape: 2"),
        ({"max_position_embeddings": None}, "transformers cannot use it"),
    ],
)
def test_configs_that_describe_no_model_are_told_before_any_is_built(base, tmp_path, options, told):
    """D4, and C: null, zero heads, negative sizes, sizes beyond all memory."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **options}))
    with pytest.raises(ModelError, match=told) as error:
        loaded(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heads", [-1, -2])
def test_what_only_a_forward_pass_finds_is_one_line(tmp_path, heads):
    tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=300)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "n_head": heads}))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: transformers cannot use it") as error:
        policy_of(load_model(ModelConfig(path=str(tmp_path), device="cpu"), train_base=False), fused=True)
    assert "\n" not in str(error.value)


def test_an_index_that_a_config_names_is_looked_at_too(base, tmp_path):
    """D3: transformers reads another index than the usual one, where ``transformers_weights`` names it."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    table = json.loads((folder / "config.json").read_text())
    table["transformers_weights"] = "other.safetensors.index.json"
    (folder / "config.json").write_text(json.dumps(table))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "other.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names pytorch_model.bin; expected"):
        loaded(folder)
