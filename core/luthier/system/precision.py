"""Where a model runs and in which numbers."""

import os

import torch

from luthier.errors import ConfigError, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device for ``auto`` (CUDA if there is one, else CPU) or for torch's own name of one.

    Raises:
        ConfigError: It is no device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device={name} is no device; expected auto, cpu, cuda, cuda:1 …") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device={name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices here; choose auto or cpu"
        )
    return device


def settle(deterministic: bool) -> None:
    """Say for this process how torch sums: 16-bit products in fp32, and with `deterministic` in one order.

    In 16 bits a thin product, such as the gradient of LoRA's A over thousands of rows, would lose its end.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose anew each time
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs a pass


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for ``auto`` or a name of `DTYPES`.

    ``auto`` is bf16 where the device computes in it natively, whatever dtype the checkpoint was saved in,
    and fp32 elsewhere: emulated bf16 is slower than fp32.

    Raises:
        ConfigError: The name is unknown.
    """
    if name == "auto":
        return torch.bfloat16 if _native_bf16(device) else torch.float32
    if name not in DTYPES:
        raise ConfigError(unknown("model.dtype", name, ["auto", *DTYPES]))
    return DTYPES[name]


def weights_and_autocast(dtype: torch.dtype, train_base: bool) -> tuple[torch.dtype, torch.dtype | None]:
    """Return the dtype of the weights and the one to autocast to.

    Weights that train are kept in fp32, since small steps vanish in bf16; frozen ones sit in `dtype`.

    Raises:
        ConfigError: Full fine-tuning in fp16, whose gradients overflow without loss scaling.
    """
    if not train_base or dtype == torch.float32:
        return dtype, None
    if dtype == torch.float16:
        raise ConfigError("model.dtype=float16 cannot train all weights; choose bfloat16 or float32")
    return torch.float32, dtype


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
