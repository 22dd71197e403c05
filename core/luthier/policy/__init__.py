"""From packs to log-probabilities: forward pass, attention, output head, references, generation."""

from typing import TYPE_CHECKING

from luthier.faces import attach

if TYPE_CHECKING:
    from luthier.policy.cached_policy import CachedPolicy as CachedPolicy
    from luthier.policy.generation import (
        Answer as Answer,
        Decoding as Decoding,
        answers as answers,
        check_known as check_known,
        check_room as check_room,
    )
    from luthier.policy.model_policy import ModelPolicy as ModelPolicy, policy_of as policy_of
    from luthier.policy.policy import Logprobs as Logprobs, Policy as Policy
    from luthier.policy.probe import undisturbed as undisturbed
    from luthier.policy.references import (
        References as References,
        fingerprint as fingerprint,
        keys_of as keys_of,
        load_references as load_references,
        other_references as other_references,
        save_references as save_references,
    )
    from luthier.policy.row_blocks import first_blocks_for as first_blocks_for
    from luthier.policy.score_head_setup import (
        check_head as check_head,
        check_speaks as check_speaks,
        give_head as give_head,
    )
else:
    __getattr__, __dir__, __all__ = attach(__name__)
