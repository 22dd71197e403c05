"""What the contenders of ``bench.merge`` are asked to do: the same merges, in the words of each."""

import json
import sys
from pathlib import Path
from typing import Any

LABELS = ("one", "two", "three")
LUTHIER = {
    "linear": ["merger=soup"],
    "ties": ["merger=ties", "merger.density=0.2"],
    "dare-linear": ["merger=dare", "merger.drop=0.9"],
    "dare-ties": ["merger=dare", "merger.drop=0.9", "merger.then=ties"],
}
MERGEKIT: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2}},
    "dare-linear": {"merge_method": "dare_linear", "parameters": {"density": 0.1, "normalize": True}},
    "dare-ties": {"merge_method": "dare_ties", "parameters": {"density": 0.1, "normalize": True}},
}
FLAGS = {
    "mergekit": [],
    "mergekit-flags": ["--lazy-unpickle", "--low-cpu-memory", "--async-write", "--write-threads=2"],
}
"""Of mergekit: as it comes, and with what it has for speed and memory on a CPU."""
CONTENDERS = (*FLAGS, "luthier")


def models_of(merge: str, count: int) -> tuple[str, ...]:
    """Return the models that a merge of `count` models reads, the base too where it needs one."""
    return LABELS[:count] if merge == "linear" else ("base", *LABELS[:count])


def luthier(merge: str, work: Path, out: Path, count: int, max_memory: float) -> list[str]:
    """Return the command; it writes ``out/model``."""
    models = ", ".join(f"{label}: {work / label}" for label in LABELS[:count])
    words = [*LUTHIER[merge], f"models={{{models}}}", f"run_dir={out}", f"max_memory={max_memory}"]
    if "base" in models_of(merge, count):
        words.append(f"base={work / 'base'}")
    return [sys.executable, "-m", "luthier", "merge", *words]


def mergekit(merge: str, work: Path, out: Path, count: int, flags: list[str], big: bool) -> list[str]:
    """Return the command, which writes `out`; its configuration is written beside the models.

    Sums are in fp32, as Luthier's are, whatever the models are in; the `big` ones have no tokenizer.
    """
    models = [{"model": str(work / label), "parameters": {"weight": 1.0}} for label in LABELS[:count]]
    config = {**MERGEKIT[merge], "models": models, "dtype": "float32"}
    if "base" in models_of(merge, count):
        config["base_model"] = str(work / "base")
    if big:
        config["out_dtype"] = "bfloat16"
    file = work / f"{merge}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    more = ["--no-copy-tokenizer"] * big
    return [sys.executable, "-m", "mergekit.scripts.run_yaml", str(file), str(out), *flags, *more]
