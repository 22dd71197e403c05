"""A process reward model: what a model trained with ``objective=process_reward`` says of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from luthier import Branch, Candidate, Codec, Place, Register, RewardModel, Scorer, Tree, hookimpl, option
from luthier_toolkits.rewards import check_separator, reward_network, split_steps, step_tree


@dataclass(frozen=True)
class Process(RewardModel):
    """P(step is right) of every step, made one number by `aggregate`; 0 for a completion without a step."""

    source: ClassVar[str] = (
        "Lightman et al. 2023, arXiv 2305.20050, section 2.6 and appendix F: prod, min; Wang et al. 2023, "
        "arXiv 2312.08935, section 3.4: min; Snell et al. 2024, arXiv 2408.03314, section 5.1: last"
    )

    model: str | None = option(None, "Run or model folder of objective=process_reward.")
    aggregate: Literal["min", "prod", "mean", "last"] = option(
        "min", "How the steps' probabilities become one: min, prod, mean or last."
    )
    separator: str = option("\n", "What stands between two steps, as in training.")

    def __post_init__(self) -> None:
        """Check the separator.

        Raises:
            ConfigError: It is empty.
        """
        check_separator(self.separator)

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> torch.Tensor:
        """Return (n,) float32; the model is loaded for it."""
        pairs = zip(prompts, completions, strict=True)
        return self.scorer(Place())([Candidate(prompt, completion) for prompt, completion in pairs])

    def scorer(self, place: Place) -> Scorer:
        """Load the model.

        Raises:
            ModelError: It is not there, or has no head for tokens.
        """
        judge = reward_network(self.model, "token", place, "process")

        def score(candidates: Sequence[Candidate]) -> torch.Tensor:
            steps = [torch.sigmoid(logits) for logits in judge.marks(candidates, self._tree)]
            return torch.tensor([self.aggregated(chances) for chances in steps], dtype=torch.float32)

        return score

    def aggregated(self, steps: torch.Tensor) -> float:
        """Return one number of the steps' probabilities (k,)."""
        if not len(steps):
            return 0.0
        ways = {"min": steps.min(), "prod": steps.prod(), "mean": steps.mean(), "last": steps[-1]}
        return float(ways[self.aggregate])

    def _tree(self, candidate: Candidate, codec: Codec) -> Tree:
        if steps := split_steps(candidate.completion, self.separator):
            own = candidate.prompt, steps, codec, candidate.origin, self.separator, candidate.tools
            return step_tree(*own)
        nothing = Branch((codec.tokenizer.eos_token_id,), (False,))
        prompt = codec.prompt_ids(candidate.prompt, candidate.origin, candidate.tools)
        return Tree(tuple(prompt), (nothing,), candidate.origin)


@hookimpl
def register_reward_models(register: Register) -> None:
    """Register `process`."""
    register("process", Process)
