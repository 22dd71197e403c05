"""A model with a score head at work: candidates to token trees, a prompt once for all its completions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from luthier.config import ModelConfig
from luthier.contracts import Candidate, Place
from luthier.errors import ConfigError, DataError, ModelError
from luthier.models import find_source, head_of, load_tokenizer
from luthier.policy import ModelPolicy, policy_of, undisturbed
from luthier.text import Codec
from luthier.trees import Branch, Pack, Tree, cut
from luthier_toolkits.rewards.detached import DetachedAdapter

if TYPE_CHECKING:
    from luthier.models import LoadedModel

Draw = Callable[[Candidate, Codec], Tree]
"""Makes the tree of one candidate, with one branch."""


@dataclass(frozen=True)
class RewardNetwork:
    """A reward model's network; text is tokenised by its own tokenizer.

    Attributes:
        policy: What runs it.
        codec: Its tokenizer.
        context: Most tokens of prompt and completion together; None: not known.
        pack_tokens: Tokens one forward pass may hold.
        detached: The adapter that is put on the model for it; None: it is as it should be.
    """

    policy: ModelPolicy
    codec: Codec
    context: int | None
    pack_tokens: int
    detached: DetachedAdapter | None = None

    def ends(self, candidates: Sequence[Candidate]) -> torch.Tensor:
        """Return the score at the last token of every candidate, (n,) float32 on the CPU."""
        scored = self._scored(candidates, answer_tree, marked=False)
        return torch.tensor([float(scores[-1]) for scores in scored], dtype=torch.float32)

    def marks(self, candidates: Sequence[Candidate], draw: Draw) -> list[torch.Tensor]:
        """Return the scores at the scored tokens of the trees that `draw` makes, (steps,) of each."""
        return self._scored(candidates, draw, marked=True)

    def _scored(self, candidates: Sequence[Candidate], draw: Draw, marked: bool) -> list[torch.Tensor]:
        trees, owners = self._trees(candidates, draw)
        marks: dict[int, torch.Tensor] = {}
        model = self.policy.model
        with contextlib.ExitStack() as stack:
            if self.detached is not None:
                stack.enter_context(self.detached.on(model))
            stack.enter_context(undisturbed(model))
            for places in cut(trees, self.pack_tokens):
                pack = Pack.of([trees[place] for place in places], self.policy.device)
                scores = self.policy.scores(pack, pack.places if marked else pack.ends).float().cpu()
                sizes = [b - a for a, b in zip(pack.offsets, pack.offsets[1:], strict=False)]
                parts = torch.split(scores, sizes if marked else [1] * len(sizes))
                marks.update(zip((owner for place in places for owner in owners[place]), parts, strict=True))
        return [marks[place] for place in range(len(candidates))]

    def _trees(self, candidates: Sequence[Candidate], draw: Draw) -> tuple[list[Tree], list[list[int]]]:
        """Return trees that share what prompts have in common, and which candidates their branches are."""
        together: dict[tuple[int, ...], tuple[Tree, list[int]]] = {}
        for place, candidate in enumerate(candidates):
            tree = draw(candidate, self.codec)
            length = len(tree.prompt) + len(tree.branches[0].ids)
            if self.context and length > self.context:
                raise DataError(
                    f"{candidate.origin}: {length:,} tokens of prompt and completion are more than the "
                    f"reward model's context, {self.context:,}; leave the row out, or lower max_new_tokens"
                )
            first, owners = together.setdefault(tree.prompt, (replace(tree, branches=()), []))
            together[tree.prompt] = replace(first, branches=first.branches + tree.branches), [*owners, place]
        return [tree for tree, _ in together.values()], [owners for _, owners in together.values()]


def answer_tree(candidate: Candidate, codec: Codec) -> Tree:
    """Return the tree of a candidate as training sees it: with an end token where it came to one."""
    if not candidate.completion.strip():
        end = codec.tokenizer.eos_token_id if isinstance(candidate.prompt, str) else codec.turn_end
        prompt = codec.prompt_ids(candidate.prompt, candidate.origin, candidate.tools)
        return Tree(tuple(prompt), (Branch((end,)),), candidate.origin)
    answer: Any = candidate.completion
    if not isinstance(candidate.prompt, str):
        answer = [{"role": "assistant", "content": candidate.completion}]
    tree = codec.pair(candidate.prompt, answer, candidate.origin, tools=candidate.tools)
    ids = tree.branches[0].ids
    ended = candidate.finished or len(ids) == 1
    return replace(tree, branches=(Branch(ids if ended else ids[:-1]),))


def reward_network(path: str | None, kind: str, place: Place, name: str) -> RewardNetwork:
    """Return the judge saved at `path`, sharing the base in `place` where it is an adapter on the same one.

    Args:
        path: A run or model folder, or a hub name.
        kind: The kind of head it must have.
        place: Where it will be at work.
        name: Of the reward model, for messages.

    Raises:
        ConfigError: No path is given.
        ModelError: It is not there, or is no reward model of that kind.
    """
    option = f"reward_models.{name}.model"
    if not path:
        raise ConfigError(f"{option} is missing: the run folder of a reward model")
    from luthier.models import load_model

    config = OmegaConf.structured(ModelConfig(path=path, device=place.device, dtype=place.dtype))
    try:
        source, host = find_source(config), place.host
        if host is not None and source.adapter is not None and source.base == host.name:
            judge = _beside(host, source.adapter, place)
        else:
            judge = _alone(load_model(config, train_base=False), place)
    except (ModelError, ConfigError) as error:
        raise ModelError(str(error).replace("model.path", option)) from error
    head = judge.detached.head if judge.detached else head_of(judge.policy.model)
    head_kind = getattr(head, "kind", None)
    if head_kind != kind:
        what = f"its head is of the kind {head_kind}" if head_kind else "it has no score head"
        raise ModelError(f"{option}={path}: {what}; expected a reward model of the kind {kind}")
    return judge


def _alone(loaded: LoadedModel, place: Place) -> RewardNetwork:
    loaded.model.requires_grad_(False)
    return RewardNetwork(
        policy_of(loaded, fused=True), Codec(loaded.tokenizer), loaded.context, place.pack_tokens
    )


def _beside(host: LoadedModel, adapter: Path, place: Place) -> RewardNetwork:
    beside = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter)) if beside else host.tokenizer
    policy = ModelPolicy(host.model, autocast_dtype=host.autocast_dtype)
    return RewardNetwork(
        policy, Codec(tokenizer), host.context, place.pack_tokens, DetachedAdapter.load(host.model, adapter)
    )
