"""Weight files that lie about where their tensors are: a merge refuses what transformers refuses."""

import json
import struct

import pytest
from safetensors import SafetensorError, safe_open

from helpers import save_tiny
from luthier import ModelError, compose
from luthier_plugins.commands.merge import merge

NORM, HEAD = "model.norm.weight", "lm_head.weight"


def norm(**entry):
    return lambda header, data: header[NORM].update(entry)


def overlap(header, data):
    header[HEAD]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]


DAMAGES = {
    "two tensors in one place": overlap,
    "before the data": norm(data_offsets=[-128, 0]),
    "bytes behind the data": lambda header, data: data.extend(b"xx"),
    "a gap before the data": lambda header, data: data.__setitem__(slice(0, 0), b"\0\0\0\0"),
    "no list of sides": norm(shape="32"),
    "a side of a fraction": norm(shape=[32.0]),
    "a side that is no number": norm(shape=["32"]),
    "a truth value as a side": norm(shape=[True], data_offsets=[False, 4]),
    "places that are texts": norm(data_offsets=["0", "128"]),
    "a type that is a list": norm(dtype=["F32"]),
    "metadata that are no table": lambda header, data: header.update(__metadata__=[1]),
}


def rewrite(file, change):
    raw = file.read_bytes()
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8:begin]), bytearray(raw[begin:])
    change(header, data)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(tmp_path):
    with pytest.raises(SafetensorError), safe_open(tmp_path / "two" / "model.safetensors", framework="pt"):
        pass  # transformers reads it no better
    models = f"models={{one: {tmp_path}/one, two: {tmp_path}/two}}"
    with pytest.raises(ModelError, match=r"models\.two: .*model\.safetensors is damaged: ") as caught:
        merge(compose("merge", [models, "merger=soup", f"run_dir={tmp_path}/run"]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


@pytest.fixture
def models(tmp_path):
    for name in ("one", "two"):
        save_tiny(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_header_that_lies_is_refused(models, damage):
    rewrite(models / "two" / "model.safetensors", DAMAGES[damage])
    refused(models)


def test_a_name_that_is_there_twice_is_refused(models):
    file = models / "two" / "model.safetensors"
    raw = file.read_bytes()
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    other = json.loads(raw[8:begin])["model.layers.0.input_layernorm.weight"]
    text = raw[8:begin].rstrip()[:-1] + f', "{NORM}": {json.dumps(other)}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[begin:])
    refused(models)


def test_a_header_of_endless_lists_is_refused(models):
    text = b"[" * 100_000 + b"]" * 100_000
    (models / "two" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(models)
