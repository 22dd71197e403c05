"""transformers' ``from_pretrained``, quiet, with errors of one line, and of whole checkpoints only."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from safetensors import safe_open

from luthier.errors import LuthierError, ModelError

_COUNTS = re.compile(r"(.*_)?(layers?|blocks?|experts?|labels)")
"""Options of a config that say how many modules there are; each is built before a weight is read."""
MOST = 2048
"""Of them: several times what the largest models have."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and chatter for the duration of the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def from_pretrained(loader: Any, base: str, **options: Any) -> Any:
    """Return ``loader.from_pretrained(base, **options)``; code that comes with a checkpoint never runs.

    Configs and models are loaded by `load_config` and `load_whole`.

    Args:
        loader: ``AutoTokenizer`` or another class of transformers.
        base: A folder, or a name at the Hugging Face hub.
        options: What else the loader takes.

    Raises:
        ModelError: Whatever transformers says, in one line, with what was expected and the way out.
        LuthierError: What a quantiser of ours says, as it is.
    """
    return told(base, lambda: loader.from_pretrained(base, trust_remote_code=False, **options))


def load_config(base: str, revision: str | None = None) -> Any:
    """Return the config of the checkpoint `base`.

    Raises:
        ModelError: It is not there, or describes no model that could be built.
    """
    from transformers import AutoConfig, PretrainedConfig

    table, _ = told(base, lambda: PretrainedConfig.get_config_dict(base, revision=revision))
    if not isinstance(table, dict) or not isinstance(table.get("quantization_config") or {}, dict):
        raise ModelError(f"{base}: its config.json is damaged: expected a table, also as quantization_config")
    parts = [table, *(value for value in table.values() if isinstance(value, dict))]
    for name, count in ((name, count) for part in parts for name, count in part.items()):
        if _COUNTS.fullmatch(name) and isinstance(count, int) and count > MOST:
            raise ModelError(f"{base}: its config.json has {name}={count}; no model has more than {MOST}")
    return from_pretrained(AutoConfig, base, revision=revision)


def load_whole(
    loader: Any, base: str, *, beside: tuple[str, ...] = (), by_shapes: bool = True, **options: Any
) -> Any:
    """Return the model that `from_pretrained` does, if the checkpoint holds it all and nothing else.

    transformers itself draws what is missing and drops what is left over.

    Args:
        loader: A model class of transformers.
        base: A folder, or a name at the Hugging Face hub.
        beside: Modules that may be missing or left over.
        by_shapes: Look at it without weights first, as what is missing would take time and memory; not
            possible where the file itself is quantised.
        options: What else the loader takes.

    Raises:
        ModelError: Tensors are missing, left over or of other shapes; or as of `from_pretrained`.
    """
    first = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if by_shapes:
        first.pop("quantization_config", None)
        first["device_map"] = {"": "meta"}
    model, found = from_pretrained(loader, base, **first)
    if by_shapes and "gguf_file" not in options:
        floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        found["whole"] = floating & told(base, lambda: set(_whole_numbers(base, options.get("revision"))))
    if faults := _faults(found, beside):
        raise ModelError(
            f"{base}: {', '.join(faults)}; expected all tensors of {type(model).__name__} as its config.json "
            "describes it, and no others: copy the checkpoint again, or take the config that belongs to it"
        )
    return from_pretrained(loader, base, **options) if by_shapes else model


def _faults(found: dict[str, Any], beside: tuple[str, ...]) -> list[str]:
    """Return how many tensors there are of each fault, and the first ones' names."""
    kinds = {
        "missing": found["missing_keys"],
        "unexpected": found["unexpected_keys"],
        "of another shape": {name for name, *_ in found["mismatched_keys"]},
        "of whole numbers": found.get("whole", ()),
    }
    faults = []
    for kind, keys in kinds.items():
        if names := sorted(name for name in keys if name.partition(".")[0] not in beside):
            shown = ", ".join(names[:2]) + ", …" * (len(names) > 2)
            faults.append(f"tensors {kind}: {len(names)} ({shown})")
    return faults


def _whole_numbers(base: str, revision: str | None) -> Iterator[str]:
    """Yield the tensors that are stored as whole numbers, which transformers takes for weights as well."""
    for file in weight_files(base, revision):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if not stored.get_slice(name).get_dtype().startswith(("F", "BF")):
                    yield name


def weight_files(base: str, revision: str | None) -> list[str]:
    """Return the files that transformers reads the weights of `base` from."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if (whole := cached_file(base, SAFE_WEIGHTS_NAME, **options)) is not None:
        return [whole]
    index = cached_file(base, SAFE_WEIGHTS_INDEX_NAME, **options)
    return get_checkpoint_shard_files(base, index, revision=revision)[0] if index else []


def told(base: str, load: Callable[[], Any]) -> Any:
    """Return ``load()``, in which transformers reads or runs a part of `base`.

    Raises:
        ModelError, LuthierError: As of `from_pretrained`.
    """
    try:
        with quiet():
            return load()
    except LuthierError:
        raise
    except Exception as error:  # of what is damaged, transformers and its libraries say so in their own ways
        raise ModelError(f"{base}: {_reason(base, error)}") from error


def _reason(base: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in said:
        return "needs code that comes with the checkpoint, which Luthier never runs; choose another model"
    if Path(base).is_dir() or not isinstance(error, OSError):
        return f"transformers cannot use it: {said[:300]}"
    return (
        "is neither a folder here nor a name the Hugging Face hub gives us now. Expected a transformers "
        "folder, a hub name such as 'HuggingFaceTB/SmolLM2-135M-Instruct', a .gguf file or a run folder. "
        "Check the spelling, the connection and `hf auth login`"
    )
