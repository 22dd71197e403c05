"""How a pack runs through a model: as token trees, or, where a model cannot take them, as padded rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from luthier.errors import ModelError
from luthier.policy.attention import use_native, use_tree
from luthier.policy.head import Head
from luthier.trees import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Forward(Protocol):
    """One way to run packs.

    Attributes:
        path: Its name.
    """

    path: str

    def attach(self) -> None:
        """Switch the model to the attention this way needs.

        Raises:
            ModelError: The model cannot be run this way.
        """

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """Return (n, d), the last hidden states at `positions` (n,) of the pack's row."""

    def logprobs(self, pack: Pack) -> torch.Tensor:
        """Return (N,) float32, the log-probabilities of the pack's scored tokens."""

    def both(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those, and (N, d), the hidden states that they were predicted from."""


class _Headed(Forward):
    """The output head at the scored positions only."""

    def __init__(self, model: PreTrainedModel, head: Head) -> None:
        self.model, self.head = model, head

    def logprobs(self, pack: Pack) -> torch.Tensor:
        """See `Forward.logprobs`."""
        return self.both(pack)[0]

    def both(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Forward.both`."""
        hidden = self.hidden(pack, pack.positions)
        return self.head.logprobs(hidden, pack.targets), hidden


class TreeForward(_Headed):
    """All trees in one row; nothing is computed twice."""

    path = "tree"

    def attach(self) -> None:
        """Switch to tree attention; refuse chunked attention, which only the model's own mask knows."""
        if self.model.config.get_text_config().to_dict().get("attention_chunk_size"):
            raise ModelError(f"{type(self.model).__name__} attends in chunks (attention_chunk_size)")
        use_tree(self.model)

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """See `Forward.hidden`."""
        out = self.model.get_decoder()(
            input_ids=pack.input_ids, position_ids=pack.position_ids, tree_spans=pack.spans, use_cache=False
        )
        return _picked(out.last_hidden_state[0], positions)


class _Padded:
    """Every path from a root to a leaf is a padded row of a batch; prompts are repeated for each child."""

    path = "padded"
    model: PreTrainedModel

    def attach(self) -> None:
        """Switch to the model's own attention."""
        use_native(self.model)

    def hidden(self, pack: Pack, positions: torch.Tensor) -> torch.Tensor:
        """See `Forward.hidden`."""
        ids, mask, places = _rows(pack)
        out = self.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        return _picked(out.last_hidden_state.flatten(0, 1), places[positions])


class PaddedForward(_Padded, _Headed):
    """Padded rows, and the head at the scored positions only."""


class PaddedLogits(_Padded):
    """Padded rows through the model's own head, for heads that are not one linear map."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def logprobs(self, pack: Pack) -> torch.Tensor:
        """See `Forward.logprobs`."""
        ids, mask, places = _rows(pack)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scored = _picked(logits.flatten(0, 1), places[pack.positions]).float().log_softmax(-1)
        return scored.gather(1, pack.targets[:, None])[:, 0]

    def both(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Forward.both`; the model runs twice."""
        return self.logprobs(pack), self.hidden(pack, pack.positions)


def _picked(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return ``rows[places]``, whose gradients are summed in one order where branches share a place.

    Of torch's two ways, CUDA sorts for the one and adds atomically for the other; on a CPU it is the reverse.
    """
    return rows[places] if rows.device.type == "cuda" else rows.index_select(0, places)


def _rows(pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return padded ids (B, L), their mask (B, L), and for each token of the pack its place in (B * L)."""
    paths = [
        tree.prompt + ids for tree in pack.trees for ids in [branch.ids for branch in tree.branches] or [()]
    ]
    width = max(map(len, paths))
    places: list[int] = []
    row = 0
    for tree in pack.trees:
        shift = len(tree.prompt)
        places.extend(range(row * width, row * width + shift))
        for child, branch in enumerate(tree.branches):
            start = (row + child) * width + shift
            places.extend(range(start, start + len(branch.ids)))
        row += max(1, len(tree.branches))
    device = pack.input_ids.device
    ids = torch.tensor([path + (0,) * (width - len(path)) for path in paths], device=device)
    mask = torch.tensor([[1] * len(path) + [0] * (width - len(path)) for path in paths], device=device)
    return ids, mask, torch.tensor(places, device=device)
