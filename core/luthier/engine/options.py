"""The options of the loop that belong to no method and to no single command."""

from dataclasses import dataclass

from luthier.contracts import option


@dataclass
class ScheduleConfig:
    """The learning-rate schedule, by transformers' names."""

    name: str = option("cosine", "One of transformers': constant (no warm-up), linear, cosine, polynomial …")
    warmup: float = option(0.03, "Warm-up: W steps, below 1 a share of all; the i-th has i/W of the rate.")
