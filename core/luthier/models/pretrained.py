"""transformers' ``from_pretrained``, quiet, with errors of one line, and of whole checkpoints only."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

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
    return _told(base, lambda: loader.from_pretrained(base, trust_remote_code=False, **options))


def load_config(base: str, revision: str | None = None) -> Any:
    """Return the config of the checkpoint `base`.

    Raises:
        ModelError: It is not there, or describes no model that could be built.
    """
    from transformers import AutoConfig, PretrainedConfig

    table, _ = _told(base, lambda: PretrainedConfig.get_config_dict(base, revision=revision))
    for key, value in table.items():
        for name, count in value.items() if isinstance(value, dict) else [(key, value)]:
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
    told = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if by_shapes:
        told.pop("quantization_config", None)
        told["device_map"] = {"": "meta"}
    model, found = from_pretrained(loader, base, **told)
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
    }
    faults = []
    for kind, keys in kinds.items():
        names = sorted(name for name in keys if name.partition(".")[0] not in beside)
        if names:
            shown = ", ".join(names[:2]) + ", …" * (len(names) > 2)
            faults.append(f"tensors {kind}: {len(names)} ({shown})")
    return faults


def _told(base: str, load: Callable[[], Any]) -> Any:
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
        return f"transformers cannot load it: {said[:300]}"
    return (
        "is neither a folder here nor a name the Hugging Face hub gives us now. Expected a transformers "
        "folder, a hub name such as 'HuggingFaceTB/SmolLM2-135M-Instruct', a .gguf file or a run folder. "
        "Check the spelling, the connection and `hf auth login`"
    )
