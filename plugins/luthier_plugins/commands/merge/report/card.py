"""What lies beside merged weights: config, tokenizer, the report and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.repocard_data import ModelCardData

from luthier.runs import as_json, versions, write_json
from luthier_plugins.commands.merge.io.inputs import MergeInput
from luthier_plugins.commands.merge.plan.tokenizer import copy_tokenizer
from luthier_plugins.commands.merge.report.result import REPORT, MergeReport


def write_companions(
    folder: Path,
    inputs: Sequence[MergeInput],
    base: MergeInput | None,
    report: MergeReport,
    digest: str,
    dtype: torch.dtype | None,
    untied: bool = False,
) -> None:
    """Write everything but the weights into `folder`.

    Args:
        folder: Of the result.
        inputs: The models; the first one's tokenizer and generation config are taken.
        base: The base, whose config is taken; without one the first model's.
        report: For ``merge.json`` and the card.
        digest: What tells the merge from any other.
        dtype: Of all floating-point tensors; None where they differ.
        untied: The result has an output head of its own.
    """
    first = base or inputs[0]
    config = dict(first.config)
    config.pop("torch_dtype", None)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        tables = [config, *([dict(config["text_config"])] if config.get("text_config") else [])]
        for table in tables:
            table["tie_word_embeddings"] = False
        config |= {"text_config": tables[1]} if len(tables) > 1 else {}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # Where an answer ends goes with the tokenizer, not with the base.
    homes = [model.checkpoint.folder / "generation_config.json" for model in (*inputs, first)]
    if generation_config := next((file for file in homes if file.is_file()), None):
        shutil.copyfile(generation_config, folder / generation_config.name)
    copy_tokenizer(inputs, folder)
    write_report(folder, [*inputs, *([base] if base else [])], report, digest)


def write_report(folder: Path, models: Sequence[MergeInput], report: MergeReport, digest: str) -> None:
    """Write ``merge.json`` and the model card."""
    hashes = {model.label: model.hashes.result() for model in models}
    write_json(
        folder / REPORT, {**as_json(report), "merge": digest, "hashes": hashes, "versions": versions()}
    )
    write_card(folder, report, hashes)


def write_card(folder: Path, report: MergeReport, hashes: dict[str, dict[str, str]]) -> None:
    """Write ``README.md``: what was merged, how, and with which versions."""
    given = ((key, json.dumps(value)) for key, value in report.merger.items() if key != "name")
    options = ", ".join(f"`{key}` {value}" for key, value in given)
    rows = {**report.models, **({"base": report.base} if report.base else {})}
    lines = [
        f"# A merge of {', '.join(report.models)}",
        "",
        f"Merged by Luthier with `{report.merger['name']}`: {options or '–'}.",
        "",
        "| model | from | file | SHA-256 |",
        "|---|---|---|---|",
        *(
            f"| {label} | {place} | {file} | `{digest}` |"
            for label, place in rows.items()
            for file, digest in hashes.get(label, {}).items()
        ),
        "",
        *(f"- {note}" for note in report.notes),
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
        f"What became of every tensor is in `{REPORT}`.",
    ]
    data = ModelCardData(library_name="transformers", tags=["merge", "luthier"])
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
