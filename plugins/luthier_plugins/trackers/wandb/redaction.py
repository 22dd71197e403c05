"""A config as plain values that may leave the machine."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

_SECRET = re.compile(r"(^|_)(token|key|password|secret)$")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def without_secrets(config: DictConfig) -> dict[str, Any]:
    """Return `config` as plain values, for a service that stores it.

    Hidden are texts whose key ends in ``token``, ``key``, ``password`` or ``secret``, and the user of an URL.
    """
    plain: dict[str, Any] = _hidden(OmegaConf.to_container(config, resolve=True), "")
    return plain


def _hidden(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _hidden(child, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [_hidden(child, key) for child in value]
    if not isinstance(value, str):
        return value
    return "(hidden)" if _SECRET.search(key) else _CREDENTIALS.sub("(hidden)@", value)
