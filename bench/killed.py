"""Runs killed with SIGKILL at random moments and resumed until done end in the weights of one never killed.

    python -m bench.killed --runs 20

For `lora` and `full`, on CPU. Every run is killed after a random time, resumed with ``resume=auto``, perhaps
killed again, until it ends by itself; then its saved weights are compared byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS = 300


def prepare(folder: Path) -> None:
    """Write a small random model, its tokenizer of single bytes, and rows of sums."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(30) for b in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(folder: Path, run_dir: Path, adapter: str) -> list[str]:
    """Return the command line of a run that goes on with what `run_dir` holds."""
    return [
        sys.executable, "-m", "luthier", "train", f"model.path={folder}/base", "model.dtype=float32",
        "data=jsonl", f"data.path={folder}/rows.jsonl", f"adapter={adapter}", f"run_dir={run_dir}",
        f"max_steps={STEPS}", "batch_size=16", "checkpoint.every=7", "resume=auto",
        *(["adapter.dropout=0.1"] if adapter == "lora" else []),
    ]  # fmt: skip


def weights(run_dir: Path) -> str:
    """Return the SHA-256 of the saved weights."""
    (file,) = (run_dir / "model").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def killed_until_done(arguments: list[str], longest: float) -> int:
    """Start, kill after a random time, start again; return how often it was killed before it ended."""
    most = random.choice((1, 1, 2, 3))
    kills = 0
    while True:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=random.uniform(0.2, longest) if kills < most else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        if process.returncode:
            raise SystemExit(f"a resumed run failed: {said.decode()}")
        return kills


def compare(folder: Path, adapter: str, runs: int) -> int:
    """Return how many kills `runs` runs met; the weights of every one were compared."""
    whole = folder / f"{adapter}-whole"
    start = time.monotonic()
    subprocess.run(command(folder, whole, adapter), check=True, stdout=subprocess.DEVNULL)
    longest, expected, kills = time.monotonic() - start, weights(whole), 0
    for number in range(runs):
        run_dir = folder / f"{adapter}-{number}"
        kills += killed_until_done(command(folder, run_dir, adapter), longest)
        if weights(run_dir) != expected:
            raise SystemExit(f"{adapter}: run {number} ended in other weights after {kills} kills")
        shutil.rmtree(run_dir)
    return kills


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20, help="runs to kill, for each adapter (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    random.seed(options.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for adapter in ("lora", "full"):
            kills = compare(folder, adapter, options.runs)
            print(
                f"{adapter}: {options.runs} runs, {kills} kills: all end in the weights of a whole run",
                flush=True,
            )


if __name__ == "__main__":
    main()
