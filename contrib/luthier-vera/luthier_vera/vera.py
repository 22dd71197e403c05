"""VeRA: vectors that scale one frozen random pair of matrices, shared by all layers.

Deliberately missing: biases that train, several adapters on one pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier import (
    AdaptedLinear,
    ConfigError,
    LinearAdapter,
    ModelError,
    Register,
    copy_state,
    hookimpl,
    linear_shape,
    option,
    weight_of,
)

SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"


class Projections(nn.Module):
    """The frozen pair: A (r, the widest input), B (the widest output, r), Kaiming-uniform from one seed.

    It is drawn as PEFT draws it, so a folder without the pair means the same here and there. A checkpoint
    need not hold what a seed gives again: the buffers are not persistent.
    """

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, d_in: int, d_out: int, seed: int, device: torch.device) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            matrix = nn.init.kaiming_uniform_(torch.empty(shape), nonlinearity="relu", generator=drawn)
            self.register_buffer(name, matrix.to(device), persistent=False)


class VeRALinear(AdaptedLinear):
    """``base(x) + b ⊙ B (d ⊙ A dropout(x))``; d is (r,) and b (d_out,), both fp32, b zero at start."""

    def __init__(self, base: nn.Module, shared: Projections, d_initial: float, dropout: float) -> None:
        super().__init__(base)
        self.shared, self.dropout = shared, dropout
        like = torch.empty((), dtype=torch.float32, device=weight_of(base).device)
        self.vera_d = nn.Parameter(like.new_full((shared.A.shape[0],), d_initial))
        self.vera_b = nn.Parameter(like.new_zeros(self.out_features))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return this layer's part of the shared pair: A (r, d_in) and B (d_out, r)."""
        return self.shared.A[:, : self.in_features], self.shared.B[: self.out_features]

    def adapted(self, x: Tensor) -> Tensor:
        """Map x (…, d_in) to (…, d_out)."""
        y: Tensor = self.base(x)
        a, b = self.factors()
        u = F.linear(F.dropout(x, self.dropout, self.training), a.to(x.dtype))  # (…, r)
        u = F.linear(u * self.vera_d.to(u.dtype), b.to(u.dtype))  # (…, d_out)
        return y + (u * self.vera_b.to(u.dtype)).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + diag(b) B diag(d) A, fp32."""
        a, b = self.factors()
        return self.base_weight() + (self.vera_b[:, None] * b) @ (self.vera_d[:, None] * a)

    def adapter_state(self) -> dict[str, Tensor]:
        """The two vectors, by PEFT's names."""
        return {"vera_lambda_d": self.vera_d.detach(), "vera_lambda_b": self.vera_b.detach()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the vectors in; ModelError if they do not fit."""
        copy_state({"vera_lambda_d": self.vera_d, "vera_lambda_b": self.vera_b}, state)


@dataclass(frozen=True)
class VeRA(LinearAdapter):
    """Vector-based random matrix adaptation: ``y = W x + b ⊙ B (d ⊙ A dropout(x))``; d and b train."""

    source: ClassVar[str] = "Kopiczko et al. 2024, arXiv 2310.11454, section 3; d_initial: table 6"
    peft_kind: ClassVar[str] = "VERA"
    peft_options: ClassVar[frozenset[str]] = frozenset(
        {"r", "d_initial", "vera_dropout", "projection_prng_key", "save_projection", "init_weights"}
    )
    peft_shared: ClassVar[frozenset[str]] = frozenset({SHARED_A, SHARED_B})

    rank: int = option(256, "Rank r of the shared pair; only vectors train, so it may be high.")
    d_initial: float = option(0.1, "What d starts at.")
    dropout: float = option(0.0, "Share of the inputs of A that is dropped in training.")
    targets: Any = option("all-linear", "Suffix names, a regular expression, or all-linear.")
    projection_seed: int = option(0, "Seed of the shared pair.")
    save_projection: bool = option(True, "Save the pair too, so that no other machine need draw it again.")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: A value that cannot train.
        """
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be in [0, 1)")
        if self.d_initial == 0:
            raise ConfigError("d_initial=0 cannot train: b starts at zero, too")

    def wrap_all(
        self, bases: Mapping[str, nn.Module], generator: torch.Generator
    ) -> Mapping[str, AdaptedLinear]:
        """Wrap every layer around one pair as wide as the widest of them; `generator` has no part in it."""
        shapes = [linear_shape(base) for base in bases.values()]
        device = weight_of(next(iter(bases.values()))).device
        widest = max(d_in for d_in, _ in shapes), max(d_out for _, d_out in shapes)
        shared = Projections(self.rank, *widest, self.projection_seed, device)
        return {name: VeRALinear(base, shared, self.d_initial, self.dropout) for name, base in bases.items()}

    def wrap(self, name: str, base: nn.Module, generator: torch.Generator) -> AdaptedLinear:
        """Wrap one layer around a pair of its own."""
        return self.wrap_all({name: base}, generator)[name]

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return every layer's vectors, and the pair if it is saved."""
        shared = _shared(model)
        return {**super().state(model), **(shared if self.save_projection else {})}

    def load_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy the vectors in, and the pair where it was saved.

        Raises:
            ModelError: A tensor is missing, left over or of another shape.
        """
        if shared := {name: tensor for name, tensor in state.items() if name in self.peft_shared}:
            copy_state(_shared(model), shared)
        elif self.save_projection:
            raise ModelError(f"save_projection is set, but {SHARED_A} is missing")
        super().load_state(model, {name: tensor for name, tensor in state.items() if name not in shared})

    def peft_method(self) -> dict[str, Any]:
        """PEFT's options of VeRA."""
        return {
            "r": self.rank,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> VeRA:
        """Return the adapter of PEFT's options."""
        return cls(
            rank=config["r"],
            d_initial=config.get("d_initial", 0.1),
            dropout=config.get("vera_dropout", 0.0),
            targets=list(config["target_modules"]),
            projection_seed=config.get("projection_prng_key", 0),
            save_projection=config.get("save_projection", True),
        )


def _shared(model: nn.Module) -> dict[str, Tensor]:
    pair = next(module for module in model.modules() if isinstance(module, Projections))
    return {SHARED_A: pair.A, SHARED_B: pair.B}


@hookimpl
def register_adapters(register: Register) -> None:
    """Register `vera`."""
    register("vera", VeRA)


@hookimpl
def config_packages() -> str:
    """Bring the recipe `vera_small`."""
    return "luthier_vera.conf"
