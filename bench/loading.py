"""A model loaded in a process of its own, and the memory that took: ``python -m bench.loading HOW MODEL``.

Anonymous memory only: a mapped file costs nothing that the system could not take back. What libraries and the
tokenizer take is not counted.
"""

import gc
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from luthier.config import ModelConfig, build_method
from luthier.models import load_model, load_tokenizer
from luthier_toolkits.bitsandbytes import require

QUANTISED = re.compile(r"\.layers\.\d+\..*_proj\.")


def resident() -> int:
    """Return the anonymous memory of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


def ours(quantiser: str) -> Callable[[str], Any]:
    """Return what loads a model in bf16 as Luthier does."""

    def load(path: str) -> Any:
        config = ModelConfig(path=path, dtype="bfloat16", device="cpu")
        made = None if quantiser == "none" else build_method("quantiser", {"name": quantiser})
        return load_model(config, train_base=False, quantiser=made).model

    return load


def transformers_nf4(path: str) -> Any:
    """Load a model into NF4 as a user of transformers does."""
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=options
    )


HOW = {
    "luthier-bf16": ours("none"),
    "luthier-nf4": ours("nf4"),
    "luthier-int8": ours("int8"),
    "transformers-nf4": transformers_nf4,
}


def shape_alone(path: str) -> Any:
    """Return the model without memory, so that the code of it is imported."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def layer_bytes(model: Any) -> int:
    """Return what the layers that a quantiser quantises store, scales included."""
    state = model.state_dict()
    return sum(one.numel() * one.element_size() for name, one in state.items() if QUANTISED.search(name))


def measure(load: Callable[[str], Any], path: str) -> dict[str, float]:
    """Return MiB: the most while loading, what stays, and what the quantised layers store."""
    require()
    _kept = (load_tokenizer(path), shape_alone(path))
    gc.collect()
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        model = load(path)
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - began
    gc.collect()
    memory = {"peak": most[0] - before, "kept": resident() - before, "layers": layer_bytes(model)}
    return {**{name: value / 2**20 for name, value in memory.items()}, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(measure(HOW[sys.argv[1]], sys.argv[2])))
