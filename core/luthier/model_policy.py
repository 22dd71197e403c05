"""From a loaded model to the policy that objectives see."""

from __future__ import annotations

from luthier.fused import fuse
from luthier.model import LoadedModel
from luthier.policy import Policy


def policy_of(loaded: LoadedModel, fused: bool) -> Policy:
    """Return the checked policy of a loaded model, its frozen parts `fused` or as transformers runs them."""
    if fused:
        fuse(loaded.model)
    policy = Policy(loaded.model, autocast_dtype=loaded.autocast_dtype)
    policy.check()
    return policy
