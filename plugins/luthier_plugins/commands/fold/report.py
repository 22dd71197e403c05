"""What folding costs, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPORT = "fold.json"


@dataclass(frozen=True)
class FoldedLayer:
    """What folding did to one layer; W is the base's weight, W′ the folded one, norms are Frobenius'.

    Attributes:
        name: The layer.
        update: ‖W′ − W‖ / ‖W‖.
        rounding_of_update: ‖round(W′) − W′‖ / ‖W′ − W‖; None where the adapter changes nothing.
        rounding_of_weight: ‖round(W′) − W′‖ / ‖W′‖.
        quantisation: ‖W_q − W‖ / ‖W‖ of the quantised base and the original; None without a quantiser.
    """

    name: str
    update: float
    rounding_of_update: float | None
    rounding_of_weight: float
    quantisation: float | None


@dataclass(frozen=True)
class FoldReport:
    """What `fold` returns, shows, and leaves as ``fold.json`` beside the model.

    Attributes:
        out: Where the model is.
        base: ``original`` or ``dequantised``.
        dtype: What was written.
        quantiser: The quantiser that was named, and its options.
        layers: The folded layers, in the model's order.
        dequantised: Quantised layers without adapter whose weights were written as training saw them.
        mean: The mean over the layers of each of their numbers.
    """

    out: Path
    base: str
    dtype: str
    quantiser: dict[str, Any] | None
    layers: tuple[FoldedLayer, ...]
    dequantised: int
    mean: dict[str, float | None]

    def worst(self, count: int = 5) -> list[FoldedLayer]:
        """Return the layers whose update rounding changes most."""
        return sorted(self.layers, key=lambda layer: -(layer.rounding_of_update or 0.0))[:count]
