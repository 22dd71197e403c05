"""Loading a model and its tokenizer, from wherever, onto one device in one dtype."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.config import ModelConfig
from luthier.contracts import Adapter, Quantiser
from luthier.errors import ModelError
from luthier.models.model_source import Source, find_source
from luthier.models.pretrained import load_config, load_whole
from luthier.models.saved_adapters import adapter_readers, reader_of
from luthier.models.score_head import HEADS, head_name, load_head, saved_kind, stored_head
from luthier.models.tokenizer import answer_ends, load_tokenizer, read_as
from luthier.models.vocabulary import add_tokens, fit
from luthier.registry import catalogue
from luthier.system import pick_device, pick_dtype, settle, weights_and_autocast
from luthier.text import Codec


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
        model: In eval mode, on `device`.
        tokenizer: With a pad token.
        dtype: What it computes in.
        device: Where.
        autocast_dtype: What to autocast to where fp32 weights compute in less; None: no autocast.
        name: Folder or hub name of the base, which an adapter trained on it records.
        adapter: The PEFT folder that was loaded on it, its weights frozen; None without one.
        quantised: Its base is stored in fewer bits.
        attached: The method of that adapter, with the options it was made with.
        new_tokens: Ids of what the tokenizer was given, and of every row that the embedding grew by.
    """

    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    autocast_dtype: torch.dtype | None
    name: str
    adapter: Path | None = None
    quantised: bool = False
    attached: Adapter | None = None
    new_tokens: tuple[int, ...] = ()

    @property
    def context(self) -> int | None:
        """The longest sequence it takes in tokens, where its config says so."""
        return _context(self.model.config)

    @property
    def vocabulary(self) -> int | None:
        """Tokens that its embedding has a row for; None: the tokenizer has no more."""
        rows = len(self.model.get_input_embeddings().weight)
        return rows if rows < len(self.tokenizer) else None


@dataclass(frozen=True)
class LoadedTokenizer:
    """What a model reads text with, without the model.

    Attributes:
        tokenizer: With a pad token.
        context: The longest sequence the model takes in tokens, where its config says so.
        name: Folder or hub name of the base.
        vocabulary: Tokens that the model's embedding has a row for; None: the tokenizer has no more.
    """

    tokenizer: Any
    context: int | None
    name: str
    vocabulary: int | None = None


def load_model_tokenizer(config: ModelConfig) -> LoadedTokenizer:
    """Load the tokenizer of the model that `config` names, as `load_model` would, but no weights.

    Raises:
        ConfigError: Options that contradict each other.
        ModelError: A model that is not there; one line says what to do.
    """
    source = find_source(config)
    model_config = load_config(source.base, config.revision)
    tokenizer, added = _tokenizer(config, source)
    rows = model_config.get_text_config().vocab_size
    # Of an adapter's rows nothing is known before it is loaded.
    grows = added or config.resize or source.adapter is not None
    vocabulary = None if grows or rows >= len(tokenizer) else rows
    return LoadedTokenizer(tokenizer, _context(model_config), source.base, vocabulary)


def _context(model_config: Any) -> int | None:
    longest: int | None = model_config.get_text_config().to_dict().get("max_position_embeddings")
    return longest


def load_model(
    config: ModelConfig,
    *,
    train_base: bool,
    quantiser: Quantiser | None = None,
    adapters: Mapping[str, type[Adapter]] | None = None,
    train_adapter: bool = False,
) -> LoadedModel:
    """Load what `config` names. Only safetensors are read, and no code that comes with a checkpoint runs.

    Args:
        config: A `ModelConfig`, or the composed node of one.
        train_base: The base weights will train: kept in fp32, computing in the chosen dtype by autocast.
        quantiser: Loads the base straight into fewer bits.
        adapters: Adapter classes by PEFT kind, for an adapter folder; the registered ones by default.
        train_adapter: The weights of an adapter folder go on training.

    Raises:
        ConfigError: Options that contradict each other or this machine.
        ModelError: A model that is not there or cannot be used; one line says what to do.
    """
    device = pick_device(config.device)
    settle(config.deterministic)
    dtype = pick_dtype(config.dtype, device)
    stored, autocast_dtype = weights_and_autocast(dtype, train_base)
    source = find_source(config)
    model_config = load_config(source.base, config.revision)
    method = _quantised_by(model_config)
    _refuse_quantised(source.base, method, train_base, quantiser)
    tokenizer, added = _tokenizer(config, source)
    kind = saved_kind(model_config.architectures)
    model = load_whole(
        AutoModelForCausalLM,
        source.base,
        beside=HEADS if kind else (),
        by_shapes=method is None,
        revision=config.revision,
        dtype=stored,
        use_safetensors=True,
        device_map={"": device},
        **(quantiser.load_options(model_config, dtype) if quantiser else {}),
    )
    if quantiser:
        quantiser.finish(model)
    elif method is not None:
        _settle_stored(model, method)
    if not train_base:
        model.requires_grad_(False)  # whoever trains a part of it says so
    _check_ends(source.base, model.generation_config.eos_token_id)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = answer_ends(model.generation_config, Codec(tokenizer))
    # What a checkpoint came with is saved with the result, even if transformers would refuse it as new.
    model.generation_config._original_object_hash = hash(model.generation_config)
    if kind:
        load_head(model, kind, stored_head(source.base, config.revision, head_name(model, kind)))
        model.score_head.requires_grad_(train_base)
    attached = None
    if source.adapter is not None:
        reader = reader_of(source.adapter, adapter_readers() if adapters is None else adapters)
        attached = reader.load(model, source.adapter, trainable=train_adapter)
    new = fit(model, tokenizer, added, config.resize)
    quantised = quantiser is not None or method is not None
    model.eval()
    return LoadedModel(
        model, tokenizer, dtype, device, autocast_dtype, source.base, source.adapter, quantised, attached, new
    )


def _check_ends(base: str, ends: Any) -> None:
    listed = ends if isinstance(ends, list) else [ends] * (ends is not None)
    if any(type(end) is not int or end.bit_length() > 63 for end in listed):
        raise ModelError(
            f"{base}: its generation_config.json has eos_token_id={ends!r}; expected ids of tokens"
        )


def _settle_stored(model: PreTrainedModel, method: str) -> None:
    """Let the quantiser that recognises `method` make a checkpoint ready that was stored by it."""
    for registered in catalogue().all():
        if registered.kind == "quantiser" and registered.cls.recognises(method):
            registered.cls.settle(model)
            break


def _quantised_by(model_config: Any) -> str | None:
    """Return the method a checkpoint was quantised with, as its config has it."""
    stored = model_config.to_dict().get("quantization_config")
    return None if stored is None else str(stored.get("quant_method"))


def _refuse_quantised(base: str, method: str | None, train_base: bool, quantiser: Quantiser | None) -> None:
    if method is not None and quantiser is not None:
        raise ModelError(f"{base}: it is quantised already ({method}): leave out quantiser")
    if method is not None and train_base:
        raise ModelError(
            f"{base}: it is quantised ({method}), and such weights cannot train: choose adapter=lora, or "
            "its checkpoint in full precision"
        )


def _tokenizer(config: ModelConfig, source: Source) -> tuple[Any, tuple[int, ...]]:
    """Return the tokenizer beside the adapter, if there is one, else the base's, and the ids it was given."""
    beside = source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(source.adapter) if beside else source.base, config.revision)
    added = add_tokens(tokenizer, config.new_tokens)
    read_as(tokenizer, config)
    return tokenizer, added
