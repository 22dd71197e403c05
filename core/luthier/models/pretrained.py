"""transformers' ``from_pretrained``, quiet and with errors of one line."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from luthier.errors import LuthierError, ModelError


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

    Args:
        loader: ``AutoConfig``, ``AutoTokenizer`` or a model class of transformers.
        base: A folder, or a name at the Hugging Face hub.
        options: What else the loader takes.

    Raises:
        ModelError: Whatever transformers says, in one line, with what was expected and the way out.
        LuthierError: What a quantiser of ours says, as it is.
    """
    try:
        with quiet():
            return loader.from_pretrained(base, trust_remote_code=False, **options)
    except LuthierError:
        raise
    # ImportError: a tokenizer or quantiser whose library is missing; RuntimeError: shapes that do not fit.
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{base}: {_reason(base, error)}") from error


def _reason(base: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return "needs code that comes with the checkpoint, which Luthier never runs; choose another model"
    if Path(base).is_dir() or not isinstance(error, OSError):
        return f"transformers cannot load it: {said[:300]}"
    return (
        "is neither a folder here nor a name the Hugging Face hub gives us now. Expected a transformers "
        "folder, a hub name such as 'HuggingFaceTB/SmolLM2-135M-Instruct', a .gguf file or a run folder. "
        "Check the spelling, the connection and `hf auth login`"
    )
