"""Rows and starting adapters of ``bench.preference``, made once and kept in ``bench/.cache``.

Run as a process of its own (``python -m bench.preference_data ROWS METHOD SHAPE [--smoke]``); importing it
loads no torch. A row of ``dpo`` is a pair; of ``kto``, where a pair makes two rows, one completion with its
label and, among the token ids, the completion of another row that KTO estimates the divergence with. That one
is drawn by Luthier, whose draw follows from the seed, and given to every contender.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from bench import data
from bench.job import Job

METHODS = ("dpo", "kto")
SHAPES = ("long-prompts", "long-completions")
INSTRUCTION = "Write the article that this sentence summarises.\n\n"
DEVIATIONS = {"start": 0.0, "moved": 0.02}
"""Adapters by name: the standard deviation of B, which training starts from at zero."""


def files(method: str, shape: str, rows: int, smoke: bool) -> tuple[Path, Path]:
    """Return where the rows (JSONL) and their token ids (JSON) are kept."""
    return data.workload_files(rows, smoke, f"{method}-{shape}")


def adapter_folder(name: str, smoke: bool) -> Path:
    """Return where the adapter of `DEVIATIONS` is kept, in PEFT's layout."""
    return data.CACHE / f"{data.model_folder(smoke).name}-lora-{name}"


def pairs(rows: int, shape: str, smoke: bool) -> list[dict[str, Any]]:
    """Return prompts with their own completion, chosen, and the next row's, rejected."""

    def texts(article: dict[str, Any]) -> tuple[str, str]:
        document = data.document(article, smoke)
        if shape == "long-prompts":
            return data.INSTRUCTION + document, article["summary"]
        return INSTRUCTION + article["summary"], document

    made = []
    for (prompt, own), (_, other) in itertools.pairwise(map(texts, data.read_xsum(rows + 1))):
        chosen, rejected = data.to_messages(prompt, own), data.to_messages(prompt, other)
        made.append({**chosen, "rejected": rejected["completion"]})
        made[-1]["chosen"] = made[-1].pop("completion")
    return made


def completions(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """Return both sides of a pair as rows of a prompt, a completion and a label."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
    ]


def job_of(method: str, rows_file: Path, smoke: bool) -> Job:
    """Return a job that names model, rows and options, to compose a config of Luthier from."""
    return Job(
        "luthier", "fp32", str(data.model_folder(smoke)), str(rows_file), ids="", work="", method=method
    )


def with_others(encoded: list[dict[str, Any]], job: Job) -> list[dict[str, Any]]:
    """Return the ids of every row, each followed by its prompt with the completion of another row."""
    import luthier
    from bench.contenders.luthier_sft import overrides
    from luthier.data import training_rows
    from luthier.engine import objective_of
    from luthier.models import load_model_tokenizer

    config = luthier.compose("train", overrides(job))
    trees = training_rows(config, load_model_tokenizer(config.model), objective_of(config)).data.trees
    both = []
    for row, tree in zip(encoded, trees, strict=True):
        own, other = (list(tree.prompt + branch.ids) for branch in tree.branches)
        if own != row["input_ids"] or len(tree.prompt) != row["prompt_length"]:
            raise ValueError(f"{tree.origin}: Luthier reads other token ids")
        both += [row, {"input_ids": other, "prompt_length": row["prompt_length"]}]
    return both


def prepare_rows(rows: int, method: str, shape: str, smoke: bool) -> None:
    """Write the rows and their token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.model_folder(smoke))
    made = pairs(rows, shape, smoke)
    single = [row for pair in made for row in completions(pair)]
    encoded = [data.encode(tokenizer, row) for row in single]
    written = files(method, shape, rows, smoke)
    data.write(written, made if method == "dpo" else single, encoded)
    if method == "kto":
        data.write(written, single, with_others(encoded, job_of(method, written[0], smoke)))


def prepare_adapters(job: Job, smoke: bool) -> None:
    """Write the adapter that a run of `job` starts from, and one that has moved away from it at random."""
    import torch

    import luthier
    from bench.contenders.luthier_sft import overrides
    from luthier.adapters import adapted_layers
    from luthier.config import build
    from luthier.models import load_model

    config = luthier.compose("train", overrides(job))
    adapter, model = build("adapter", config.adapter), load_model(config.model, train_base=False).model
    generator = torch.Generator().manual_seed(config.seed)
    adapter.attach(model, generator)
    for name, deviation in DEVIATIONS.items():
        for layer in adapted_layers(model).values():
            layer.lora_B.data.normal_(0.0, deviation, generator=generator)
        adapter.save(model, adapter_folder(name, smoke), job.model)


def main() -> None:
    """Prepare model, rows and adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    data.CACHE.mkdir(exist_ok=True)
    data.prepare_model(options.smoke)
    prepare_rows(options.rows, options.method, options.shape, options.smoke)
    rows_file, _ = files(options.method, options.shape, options.rows, options.smoke)
    prepare_adapters(job_of(options.method, rows_file, options.smoke), options.smoke)


if __name__ == "__main__":
    main()
