"""Where and with what a measurement was taken."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("luthier", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def cpu_model() -> str:
    """Return the processor's name, with family and model where the name alone says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    return (
        f"{found.get('model name', 'unknown')} (family {found.get('cpu family')}, model {found.get('model')})"
    )


def describe() -> dict[str, str]:
    """Return the machine and the versions that a result depends on."""
    facts = {"cpu": cpu_model(), "cpus": str(os.cpu_count()), "python": platform.python_version()}
    facts["load average at the end"] = f"{os.getloadavg()[1]:.1f} over 5 minutes"
    return facts | {package: _version(package) for package in PACKAGES}


def slug() -> str:
    """Return a file name's part for this machine, such as ``amd-epyc-2cpu``."""
    name = re.sub(r"[^a-z0-9]+", "-", cpu_model().split("(family")[0].lower()).strip("-")
    return f"{name}-{os.cpu_count()}cpu"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
