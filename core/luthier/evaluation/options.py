"""The options of what is measured that belong to no method and to no single command."""

from dataclasses import dataclass

from luthier.contracts import option


@dataclass
class EvaluationConfig:
    """What is measured on the held-out rows (`eval_data`)."""

    every: int = option(0, "Evaluate the loss every so many steps; 0: only before and after training.")
    generate: bool = option(True, "Answer the held-out prompts and count the answers that are right.")
    max_new_tokens: int = option(64, "Tokens an answer may have.")
    batch_size: int = option(32, "Prompts answered at a time.")
    samples: int = option(3, "Answers shown before and after training.")
    patience: int | None = option(None, "Stop after so many evaluations without a lower loss; null: never.")
    restore_best: bool = option(False, "Keep the weights of the evaluation with the lowest loss.")


@dataclass
class ReferenceConfig:
    """What an objective with a reference (dpo, ipo, kto) compares with; measured once, before training."""

    model: str | None = option(
        None, "Another checkpoint or adapter folder; null: this model as it is before the first step."
    )
    cache: str | None = option(
        None,
        "Folder where what it gives is remembered, for other runs too; null: the run folder.",
        was="memory",
    )
