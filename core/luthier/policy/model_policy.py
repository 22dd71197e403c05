"""From a loaded model to the policy that objectives see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.kernels import fuse, widen
from luthier.policy.policy import Policy

if TYPE_CHECKING:
    from luthier.models import LoadedModel


def policy_of(loaded: LoadedModel, fused: bool, wide: bool = False) -> Policy:
    """Return the checked policy of a loaded model.

    Args:
        loaded: The model, its adapter attached.
        fused: Whether frozen parts are fused, or run as transformers wrote them.
        wide: Whether the residual stream is kept in fp32, where fused norms can read it.
    """
    names = fuse(loaded.model) if fused else {}
    if wide:
        widen(loaded.model, names)
    policy = Policy(loaded.model, autocast_dtype=loaded.autocast_dtype)
    policy.check()
    return policy
