"""Models to merge, made on the spot: ``python -m bench.merge_models FOLDER COUNT [--smoke] [--big]``.

SmolLM2-135M in fp32 and copies of it whose matrices have moved by 1 %, as fine-tuning moves them. Or, with
``--big``, a random Llama of 3.2 billion parameters in bf16 and copies of it, several files each, written a
run of elements at a time. In a process of its own, so that what measures stays small.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from bench import data
from bench.merge_commands import LABELS
from luthier_plugins.commands.merge import ShardWriter, lay_out, write_index

MOVED = 0.01
"""Norm of what a copy learnt, its matrix's being 1."""
RUN = 1 << 24
BIG = {
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SMALL = {**BIG, "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Source = Callable[[str, int, int], torch.Tensor]


def big_config(smoke: bool) -> LlamaConfig:
    """Return the shape of the big model, or of a small one in its place."""
    return LlamaConfig(**(SMALL if smoke else BIG), dtype="bfloat16", architectures=["LlamaForCausalLM"])


def shapes(config: LlamaConfig) -> Tensors:
    """Return every tensor of a model without making it."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: (torch.bfloat16, tuple(one.shape)) for name, one in model.named_parameters()}


def random_source(generator: torch.Generator) -> Source:
    """Return what draws elements of a weight; ask for every element once, in order."""
    return lambda name, start, stop: 0.02 * torch.randn(stop - start, generator=generator)


def runs(tensors: Tensors) -> Iterator[tuple[str, int, int]]:
    """Yield the runs of elements that are in memory at a time."""
    for name, (_, shape) in tensors.items():
        count = torch.Size(shape).numel()
        for start in range(0, count, RUN):
            yield name, start, min(start + RUN, count)


def write_models(folder: Path, labels: tuple[str, ...], tensors: Tensors, source: Source, gb: float) -> None:
    """Write the base and the copies `labels` of it side by side: one base is drawn for all of them."""
    generators = {label: torch.Generator().manual_seed(seed) for seed, label in enumerate(labels, 1)}
    layouts = {label: lay_out(folder / label, tensors, int(gb * 1e9)) for label in ("base", *labels)}
    with ExitStack() as stack:
        writers = {label: stack.enter_context(closing(ShardWriter(one))) for label, one in layouts.items()}
        for name, start, stop in runs(tensors):
            dtype, shape = tensors[name]
            base = source(name, start, stop).float()
            writers["base"].write(name, start, base.to(dtype))
            scale = MOVED * float(base.std()) if len(shape) > 1 else 0.0
            for label, generator in generators.items():
                moved = torch.randn(len(base), generator=generator).mul_(scale).add_(base)
                writers[label].write(name, start, moved.to(dtype))
    for label, layout in layouts.items():
        write_index(folder / label, layout)


def make_big(folder: Path, labels: tuple[str, ...], smoke: bool) -> None:
    """Write the big model and its copies."""
    config = big_config(smoke)
    tensors = shapes(config)
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())
    needed, free = size * (len(labels) + 2), shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise SystemExit(
            f"{folder}: base, copies and a merge take {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free; "
            "set --work"
        )
    for label in ("base", *labels):
        config.save_pretrained(folder / label)
    source = random_source(torch.Generator().manual_seed(0))
    write_models(folder, labels, tensors, source, gb=0.005 if smoke else 2)


def make_copies(folder: Path, labels: tuple[str, ...], smoke: bool) -> None:
    """Write SmolLM2-135M, or the tiny model, and its copies."""
    data.CACHE.mkdir(exist_ok=True)
    data.prepare_model(smoke)
    model = data.model_folder(smoke)
    for label in ("base", *labels):
        shutil.copytree(
            model, folder / label, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
        )
    with safe_open(model / "model.safetensors", "pt") as file:
        tensors = {name: (torch.float32, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
        write_models(
            folder, labels, tensors, lambda n, start, stop: file.get_tensor(n).view(-1)[start:stop], gb=5
        )


def main() -> None:
    """Make the models."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--big", action="store_true")
    options = parser.parse_args()
    make = make_big if options.big else make_copies
    for label in ("base", *LABELS[: options.count]):
        (options.folder / label).mkdir(parents=True)
    make(options.folder, LABELS[: options.count], options.smoke)


if __name__ == "__main__":
    main()
