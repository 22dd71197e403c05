"""What a training step holds in memory, each part from the class that brings it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from luthier.contracts import Adapter, Loss, Objective, Optimiser, Quantiser
from luthier.policy import Policy
from luthier.trees import Pack, Tree
from luthier_plugins.commands.plan.shapes import QuantisedShape, Sampled, attach, quantise
from luthier_plugins.commands.plan.simulation import Pass, Setting, simulate

log = logging.getLogger("luthier")

RETAINED = 0.5
"""Share of what comes and goes that glibc was seen to keep beside it: from 0.07 to 1."""

KERNELS, SIZES = 16 << 20, 32
"""Bytes of 16-bit products that oneDNN compiles for a size of pack (8 to 19 MB seen); sizes it keeps."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step when it holds the most.

    Attributes:
        weights: The base, quantised or not, buffers included.
        adapter: What the adapter adds to it.
        gradients: Of everything that trains; the largest one where the optimiser frees each.
        optimiser: The optimiser's states.
        held: Other models the objective holds: reference, reward model, heads.
        activations: What the forward pass keeps for the backward pass.
        workspace: What comes and goes on top: chunks of the head, dequantised weights, tiles of attention.
        baseline: The process before the model is loaded; on a GPU, what the driver keeps.
        retained: An allowance on CPU for what the C library's allocator keeps of freed blocks.
    """

    weights: float
    adapter: float
    gradients: float
    optimiser: float
    held: float
    activations: float
    workspace: float
    baseline: float
    retained: float = 0.0

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(dataclasses.astuple(self)))

    @property
    def in_use(self) -> float:
        """The sum without the allowance: what a run measures."""
        return self.total - self.retained


@dataclass(frozen=True)
class Methods:
    """The methods of a run."""

    adapter: Adapter
    optimiser: Optimiser
    objective: Objective
    quantiser: Quantiser | None = None


@dataclass
class Counted:
    """A model with its adapter, counted exactly; tied weights count once.

    Attributes:
        model: The model, whole or sampled; no longer than until its passes are known.
        dense: Bytes of the largest quantised weight where it is multiplied with.
        parameters: All of them, the adapter's included.
        trained: Those that train.
        weights: Bytes of the base.
        adapter: Bytes of the adapter.
        gradients: Bytes of the gradients of all that trains.
        largest: Bytes of the largest of them.
        shapes: Trained tensors: name, shape, how many.
    """

    model: Sampled
    dense: float = 0.0
    parameters: int = 0
    trained: int = 0
    weights: float = 0.0
    adapter: float = 0.0
    gradients: float = 0.0
    largest: float = 0.0
    shapes: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Sampled, adapter: Adapter, quantiser: Quantiser | None) -> Counted:
        """Quantise the shapes of `model` and attach `adapter`, in place, and count.

        Raises:
            ConfigError: The adapter's options do not fit the model.
        """
        if quantiser:
            quantise(model.model, quantiser)
        counted = cls(model)
        base = {id(tensor) for tensor in _tensors(model.model).values()}
        attach(model.model, adapter)
        packed = {id(module.weight) for module in model.model.modules() if isinstance(module, QuantisedShape)}
        bits = quantiser.bits_per_weight() if quantiser else 0.0
        for name, tensor in _tensors(model.model).items():
            count, dense = model.share(name), float(tensor.nbytes)
            size = tensor.numel() * bits / 8 if id(tensor) in packed else dense
            counted.weights += count * size * (id(tensor) in base)
            counted.adapter += count * size * (id(tensor) not in base)
            if id(tensor) in packed:
                counted.dense = max(counted.dense, dense)
            if isinstance(tensor, torch.nn.Parameter):
                counted.parameters += count * tensor.numel()
            if tensor.requires_grad:
                counted.trained += count * tensor.numel()
                counted.gradients += count * dense
                counted.largest = max(counted.largest, dense)
                counted.shapes.append((name, tuple(tensor.shape), count))
        return counted

    def states(self, optimiser: Optimiser) -> float:
        """Return the bytes of the states of `optimiser`."""
        return sum(count * optimiser.state_bytes(name, shape) for name, shape, count in self.shapes)


def passed(model: Sampled, trees: Sequence[Tree], objective: Objective, setting: Setting) -> Pass:
    """Return what a pack of `trees` takes in the whole of `model`.

    A layer's share is what it leaves alive in the forward pass. Where the backward pass makes gradients that
    stay, it may need more than that at its end: then the samples are run without the layer too.
    """
    whole = _simulated(model.copied(), trees, objective, setting)
    total = whole
    for place, count in enumerate(model.stands_for):
        if count == 1:
            continue
        if setting.several or setting.frees:
            share = whole.ends[place] - whole.ends[place - 1]
            layer = Pass(share, share)
        else:
            layer = whole.plus(_simulated(model.without(place), trees, objective, setting), -1)
        total = total.plus(layer, count - 1)
    return total


def _simulated(model: Sampled, trees: Sequence[Tree], objective: Objective, setting: Setting) -> Pass:
    for loss in (objective, _Likelihood()):
        spare = model.copied()
        try:
            return simulate(spare.model, trees, loss, setting, spare.sampled())
        except Exception as error:
            if isinstance(loss, _Likelihood):
                raise
            log.debug("%s cannot be run on shapes (%s)", type(objective).__name__, error)
    raise AssertionError


class _Likelihood(Objective):
    """The sum of the log-probabilities: what any loss on completions computes, and next to nothing more."""

    def encode(self, row: object, codec: object) -> Tree:
        raise NotImplementedError

    def loss(self, policy: Policy, pack: Pack) -> Loss:
        return Loss(policy.logprobs(pack).values.sum(), 1.0)


def memory(counted: Counted, methods: Methods, run: Pass, setting: Setting, baseline: float) -> Memory:
    """Put the parts together; `run` is the pass of `setting`."""
    gradients = counted.largest if setting.frees else counted.gradients
    # A pass that makes its gradients itself has counted them.
    made = setting.frees or not setting.several
    peak = max(0.0, run.peak - gradients) if made else run.peak
    kept = min(run.kept, peak)
    return Memory(
        weights=counted.weights,
        adapter=counted.adapter,
        gradients=gradients,
        optimiser=counted.states(methods.optimiser),
        held=_held(counted, methods),
        activations=kept,
        workspace=peak - kept,
        baseline=baseline,
        retained=RETAINED * peak if setting.device == "cpu" else 0.0,
    )


def kernels(device: str, dtype: torch.dtype, sizes: int = SIZES) -> float:
    """Return the bytes of what is compiled for packs of so many `sizes`."""
    return float(KERNELS * min(sizes, SIZES)) if device == "cpu" and dtype.itemsize == 2 else 0.0


def _held(counted: Counted, methods: Methods) -> float:
    """Return the bytes of the other models; a reference, measured before training, is none of them."""
    width = float(counted.model.model.config.get_text_config().hidden_size)
    sizes = {"copy": counted.weights, "head": 4.0 * width}
    return float(sum(sizes[kind] for kind in methods.objective.holds.values()))


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))
