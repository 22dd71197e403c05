"""A head that makes one number of a hidden state: what reward models and value functions end in.

It sits on the causal language model, so one base serves as policy, reference, value function and reward
model; what is saved is what transformers' own classes for sequences and tokens load.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from torch import Tensor, nn

from luthier.errors import ModelError
from luthier.models.pretrained import quiet, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "score_head"
"""What the module is called on the model."""
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
"""PEFT's names of heads that are saved; a ``value`` head is part of no result."""
HEADS = ("lm_head", "embed_out", "score", "classifier")
"""What transformers' classes call their heads: a reward model has one of them in place of another."""
ENDINGS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
"""How the classes of a saved config end."""


class ScoreHead(nn.Linear):
    """``r = w · h``, for tokens with a bias, in fp32 whatever the model computes in.

    Attributes:
        kind: ``sequence`` (one score a completion), ``token`` (one at every step) or ``value``.
    """

    def __init__(self, width: int, kind: str, device: torch.device | str = "cpu") -> None:
        super().__init__(width, 1, bias=kind == "token", device=device, dtype=torch.float32)
        self.kind = kind

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (…, d) to scores (…)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)[..., 0]


def attach_head(model: PreTrainedModel, kind: str, generator: torch.Generator) -> ScoreHead:
    """Give `model` a head of `kind` that trains.

    w ~ N(0, 1/(d + 1)) (Stiennon et al. 2020, appendix B.1); of a value function zero.
    """
    width = int(model.config.get_text_config().hidden_size)
    head = ScoreHead(width, kind, model.device)
    with torch.no_grad():
        drawn = torch.randn(1, width, generator=generator) / math.sqrt(width + 1)
        # Advantages begin as what comes of an answer, not as noise of the value function.
        head.weight.copy_(drawn * (kind != "value"))
        if head.bias is not None:
            head.bias.zero_()
    model.add_module(NAME, head)
    return head


def load_head(model: PreTrainedModel, kind: str, tensors: Mapping[str, Tensor]) -> ScoreHead:
    """Give `model` the head of `kind` that `tensors` (``weight`` and, of a token head, ``bias``) are.

    Raises:
        ModelError: They are not those of one score.
    """
    head = attach_head(model, kind, torch.Generator())
    own = head.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise ModelError(f"its head lacks '{name}'")
        if tensors[name].shape != tensor.shape:
            raise ModelError(f"its head has {len(tensors[name])} labels; a reward model has one score")
    head.load_state_dict({name: tensors[name].float() for name in own})
    return head


def head_of(model: nn.Module) -> ScoreHead | None:
    """Return the head of `model`, if it has one."""
    head = model._modules.get(NAME)
    return head if isinstance(head, ScoreHead) else None


def class_of(kind: str) -> Any:
    """Return transformers' class that loads a model with a head of `kind`, ``sequence`` or ``token``."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification


def saved_kind(architectures: Any) -> str | None:
    """Return the kind of head that a checkpoint of these ``architectures`` has; None for none."""
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((kind for kind, ending in ENDINGS.items() if first.endswith(ending)), None)


def head_name(model: PreTrainedModel, kind: str) -> str:
    """Return what transformers' class of `kind` calls the head of such a model.

    Raises:
        ModelError: transformers has no such class for it.
    """
    children = _shell(_config_of(model), kind).named_children()
    return next(str(name) for name, child in children if isinstance(child, nn.Linear))


def as_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model of transformers' class for the head that `model` carries: its base, and the head.

    Tensors are shared. A model without a head, or with a value function, is returned as it is.

    Raises:
        ModelError: transformers has no such class for it.
    """
    head = head_of(model)
    if head is None or head.kind not in TASKS:
        return model
    shell = _shell(_config_of(model), head.kind)
    setattr(shell, shell.base_model_prefix, model.base_model)
    setattr(shell, head_name(model, head.kind), _plain(head))
    return shell.train(model.training)


@contextlib.contextmanager
def without_value(model: nn.Module) -> Iterator[None]:
    """Leave a value function off `model` for the block: it is part of no result."""
    head = head_of(model)
    apart = head is not None and head.kind not in TASKS
    if apart:
        del model._modules[NAME]
    try:
        yield
    finally:
        if apart:
            model._modules[NAME] = head


def _plain(head: ScoreHead) -> nn.Linear:
    """Return the head as the linear layer that transformers has in its place."""
    linear = nn.Linear(head.in_features, 1, head.bias is not None, device="meta")
    linear.load_state_dict(head.state_dict(), assign=True)
    return linear


def _config_of(model: PreTrainedModel) -> Any:
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_labels = 1
    return config


def _shell(config: Any, kind: str) -> PreTrainedModel:
    try:
        with quiet(), torch.device("meta"):
            shell: PreTrainedModel = class_of(kind).from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"transformers has no class of '{config.model_type}' {ENDINGS[kind]}: nobody could load its head"
        ) from error
    return shell


def stored_head(base: str, revision: str | None, name: str) -> dict[str, Tensor]:
    """Return the tensors of the head called `name` in the checkpoint `base`, by their last name.

    Raises:
        ModelError: There are none.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(base, revision):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - not a mapping
                if key.startswith(f"{name}."):
                    tensors[key.removeprefix(f"{name}.")] = stored.get_tensor(key)
    if not tensors:
        raise ModelError(f"{base}: it is a reward model without its head ('{name}'): train it again")
    return tensors
