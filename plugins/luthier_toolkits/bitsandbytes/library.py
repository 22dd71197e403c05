"""The library bitsandbytes: there, with the kernels for this machine, or an error that says how."""

from __future__ import annotations

import logging
import re
from importlib.metadata import version
from typing import Any

import torch

from luthier.errors import ConfigError

BITS_AND_BYTES = "bitsandbytes"
"""What transformers calls its method."""


def require() -> Any:
    """Return the module bitsandbytes, with the native library for this machine.

    Raises:
        ConfigError: One of them is missing; which, and how to get it.
    """
    # It would tell of kernels that nothing asked for, and of every cast of its 8-bit layers.
    logging.getLogger(BITS_AND_BYTES).setLevel(logging.ERROR)
    try:
        import bitsandbytes
        from bitsandbytes import cextension
    except ImportError as error:
        raise ConfigError(f"bitsandbytes cannot be used ({error}): pip install -U bitsandbytes") from error
    lib: Any = cextension.lib
    if isinstance(lib, cextension.ErrorHandlerMockBNBNativeLibrary):
        raise ConfigError(_missing(cextension, str(lib.error_msg)))
    return bitsandbytes


def _missing(cextension: Any, said: str) -> str:
    """Return the line for a bitsandbytes whose native library does not load."""
    installed = f"bitsandbytes {version(BITS_AND_BYTES)}"
    if not torch.cuda.is_available():
        file = f"libbitsandbytes_cpu{cextension.DYNAMIC_LIBRARY_SUFFIX}"
        return f"{installed} lacks {file}, its kernels for CPU: pip install -U --force-reinstall bitsandbytes"
    if named := re.search(r"libbitsandbytes_\w+\.\w+", said):
        built = ", ".join(cextension.get_available_cuda_binary_versions()) or "none"
        return (
            f"{installed} lacks {named[0]}, its kernels for CUDA {torch.version.cuda} (it has those for "
            f"{built}): pip install -U bitsandbytes, or a torch built for one of these"
        )
    return f"{installed} cannot load its kernels for CUDA {torch.version.cuda}: {said}"
