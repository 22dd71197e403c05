"""The options that say which model, in which numbers. Importing this module imports no transformers."""

from dataclasses import dataclass
from typing import Any

from luthier.contracts import option


@dataclass
class ModelPlace:
    """Which model, and where it goes."""

    path: str | None = option(
        "???", "Transformers folder, hub name, .gguf file, run folder, PEFT folder; null with gguf_package."
    )
    gguf_package: str | None = option(None, "An installed Python package that carries one GGUF file.")
    adapter: str | None = option(None, "A PEFT folder or run folder whose adapter is loaded on the model.")
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1 …")
    revision: str | None = option(None, "Branch, tag or commit at the hub.")
    chat_template: str | None = option(
        None, "Replaces the tokenizer's: a Jinja file, or a name such as chatml."
    )
    system: str = option(
        "keep", "System turns: keep, or fold into the first user's, for templates without any."
    )
    control_tokens: str = option(
        "keep",
        "Control tokens that messages spell: keep them, or take them as text; saved with the tokenizer.",
    )
    new_tokens: list[str] = option(
        [],
        "Texts that become tokens where the tokenizer lacks them; their rows in embedding and head start at "
        "the mean of the old ones, and train beside an adapter.",
    )
    resize: bool = option(False, "Grow the embedding to the tokenizer where that has more tokens than rows.")
    shape: dict[str, Any] = option(
        {}, "The model's config (model_type, hidden_size …); read by plan alone, which then needs no model."
    )


@dataclass
class ModelConfig(ModelPlace):
    """Which model, in which numbers, where."""

    dtype: str = option("auto", "auto (bf16 where the device computes in it), float32, bfloat16 or float16.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, about a third more time."
    )
    wide_residual: bool | None = option(
        None, "Keep the residual stream in fp32 under 16-bit weights; null: where there is a reference."
    )
    fused: bool = option(True, "Run frozen MLPs, norms and products as fused functions, checked at start.")
