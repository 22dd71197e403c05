"""The suite of adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.adapters import AdaptedLinear, PeftAdapter, adapted_layers, adapter_off, fold, weight_of
from luthier.contracts import Adapter
from luthier.errors import LuthierError
from luthier.testing.adapter_promise import CLOSE, IDS, AdapterPromise, logits
from luthier.testing.models import quantised, tiny_gpt2, tiny_llama
from luthier.testing.suite import apart, seeded

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
on_both = pytest.mark.parametrize("base", sorted(MODELS))


class AdapterSuite(AdapterPromise):
    """What an `luthier.Adapter` promises, on a Llama and on a GPT-2 (whose linear layers are Conv1D).

    Attributes:
        steps: AdamW steps after which every trained tensor must have moved.
        lr: Their learning rate.
    """

    method: ClassVar[type[Adapter]]
    steps: ClassVar[int] = 5
    lr: ClassVar[float] = 1e-2

    def attached(self, model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
        """Return `model` with the adapter attached, in place."""
        self.make().attach(model, seeded(seed))
        return model

    def trained(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return `model` with the adapter attached and trained for `steps` steps, in eval mode."""
        parameters = trained_parameters(self.attached(model)).values()
        # Without weight decay, which would move what no gradient reaches.
        optimiser = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
        torch.manual_seed(0)
        model.train()
        for _ in range(self.steps):
            optimiser.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return model.eval()

    @on_both
    def test_it_starts_as_the_base(self, base: str) -> None:
        """Attached and untrained, the model gives the base model's logits."""
        off = apart(logits(self.attached(MODELS[base]())), logits(MODELS[base]()))
        assert off < CLOSE, f"logits change by {off:.1e} on attaching; start the update at zero"

    @on_both
    def test_exactly_what_trains_requires_a_gradient(self, base: str) -> None:
        """After `attach`, `requires_grad` marks the adapter's own parameters (all, if `trains_base`)."""
        model = MODELS[base]()
        of_base = {id(parameter): name for name, parameter in model.named_parameters()}
        self.attached(model)
        trained = trained_parameters(model)
        assert trained, "attach left nothing to train"
        if self.method.trains_base:
            still = of_base.keys() - {id(parameter) for parameter in trained.values()}
            assert not still, (
                f"trains_base is set, but {[of_base[parameter] for parameter in still]} stay frozen"
            )
        else:
            wrong = [name for name, parameter in trained.items() if id(parameter) in of_base]
            assert not wrong, f"{wrong} belong to the base; freeze it with model.requires_grad_(False)"
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            has = parameter.grad is not None
            assert has == parameter.requires_grad, f"{name}: gradient {has}, requires_grad {not has}"

    @on_both
    def test_every_trained_tensor_moves_and_the_base_stays(self, base: str) -> None:
        """A few steps lower the loss, move every trained tensor, and leave the base bit for bit."""
        start = self.attached(MODELS[base]())
        before = float(loss_of(start.eval()).detach())
        kept = {name: tensor.clone() for name, tensor in start.named_parameters()}
        model = self.trained(MODELS[base]())
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, kept[name])
            if parameter.requires_grad:
                assert moved, f"{name} requires a gradient but did not move in {self.steps} steps"
            else:
                assert not moved, f"{name} is frozen but changed; never write into the base"
        after = float(loss_of(model).detach())
        assert after < before, f"the loss went from {before:.4f} to {after:.4f} on the batch it trained on"

    @on_both
    def test_switched_off_it_is_the_base(self, base: str) -> None:
        """With every `AdaptedLinear` off, the trained model is the base exactly: it is the reference."""
        model = self.trained(MODELS[base]())
        skip_without_layers(model)
        with adapter_off(model):
            same = torch.equal(logits(model), logits(MODELS[base]()))
        assert same, "with enabled = False the layer must run its base and nothing else"

    @on_both
    def test_folded_it_is_the_same_function(self, base: str) -> None:
        """`merged_weight` is the weight of the plain layer that does what the adapted one does."""
        model = self.trained(MODELS[base]())
        skip_without_layers(model)
        expected = logits(model)
        fold(model)
        off = apart(logits(model), expected)
        assert off < 10 * CLOSE, f"folded, the logits are {off:.1e} off; mend merged_weight"

    @on_both
    def test_saved_and_loaded_it_is_the_same_function(self, base: str, tmp_path: Path) -> None:
        """What `save` wrote gives the same logits: a PEFT folder on the base, or a transformers model."""
        model, made = self.trained(MODELS[base]()), self.make()
        made.save(model, tmp_path / "saved", "some/base")
        if isinstance(made, PeftAdapter):
            back = MODELS[base]()
            type(made).load(back, tmp_path / "saved", trainable=True)
            assert trained_parameters(back), "loaded to go on training, nothing requires a gradient"
        else:
            back = type(model).from_pretrained(tmp_path / "saved")
        off = apart(logits(back.eval()), logits(model))
        assert off < 10 * CLOSE, f"read back, the logits are {off:.1e} off; compare state and load_state"

    def test_it_works_on_a_quantised_base(self) -> None:
        """On layers whose weight is packed int8 it starts as the base, trains, and folds to a plain layer."""
        if self.method.trains_base:
            pytest.skip("it trains the base, which a quantised one forbids")
        base = quantised(tiny_llama())
        off = apart(logits(self.attached(copy.deepcopy(base))), logits(base))
        assert off < CLOSE, (
            f"on a quantised base the logits change by {off:.1e}; run self.base, not its weight"
        )
        model = self.trained(copy.deepcopy(base))
        assert apart(logits(model), logits(base)) > CLOSE, "on a quantised base nothing was learned"
        skip_without_layers(model)
        expected = logits(model)
        fold(model, torch.float32)
        off = apart(logits(model), expected)
        assert off < 10 * CLOSE, f"folded, the logits are {off:.1e} off; use base_weight() in merged_weight"

    def test_half_precision_computes_in_it_and_trains_in_fp32(self) -> None:
        """On a bf16 base, and under bf16 autocast, what trains stays fp32 and gradients are finite fp32."""
        cases: list[tuple[str, Callable[[], PreTrainedModel], bool]] = [
            ("under autocast", tiny_llama, True),
            ("on a bf16 base", lambda: tiny_llama().to(torch.bfloat16), False),
        ]
        for where, make, autocast in cases[: 1 if self.method.trains_base else 2]:
            model = self.attached(make())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model)
            loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in trained_parameters(model).items():
                assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype} {where}, not float32"
                assert parameter.grad is not None, f"{name} has no gradient {where}"
                assert torch.isfinite(parameter.grad).all(), f"{name}: gradient not finite {where}"

    def test_the_generator_alone_decides_its_start(self) -> None:
        """Equal seeds attach equal tensors, and torch's global random state is left as it was."""
        first = self.attached(tiny_llama())
        second = tiny_llama()
        torch.manual_seed(1234)
        state = torch.get_rng_state()
        self.attached(second)
        assert torch.equal(state, torch.get_rng_state()), "attach draws globally; draw from `generator`"
        for (name, mine), other in zip(checkpoint(first).items(), checkpoint(second).values(), strict=True):
            assert torch.equal(mine, other), f"{name} differs between two attachments with one seed"

    def test_a_second_adapter_is_refused(self) -> None:
        """A model that carries an adapter is refused with a `LuthierError`, and left as it is."""
        foreign = tiny_llama()
        layer = foreign.get_submodule("model.layers.0.self_attn")
        layer.q_proj = _Foreign(layer.q_proj)
        models = [foreign]
        if not self.method.trains_base:
            models.append(self.attached(tiny_llama()))
        for model in models:
            before = list(model.state_dict())
            try:
                self.attached(model)
            except LuthierError:
                assert list(model.state_dict()) == before, "attach changed the model before it refused"
            else:
                pytest.fail("attach accepted a model with an adapter; call luthier.refuse_adapted(model)")

    def test_a_checkpoint_brings_it_back(self) -> None:
        """Trained parameters and persistent buffers are all a checkpoint holds, and they are enough."""
        model = self.trained(tiny_llama())
        back = self.attached(tiny_llama()).eval()
        back.load_state_dict(checkpoint(model), strict=False)
        same = torch.equal(logits(back), logits(model))
        assert same, "state is missing from the checkpoint; make it a parameter or a persistent buffer"

    # Newer versions of transformers call it activation_checkpointing_enable; older ones know only this name.
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
    def test_recomputing_activations_changes_no_gradient(self) -> None:
        """Gradient checkpointing runs the forward pass twice; dropout included, gradients are the same."""
        gradients = []
        for checkpointed in (False, True):
            model = self.trained(tiny_llama()).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(0)
            model.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            gradients.append({name: p.grad for name, p in trained_parameters(model).items()})
        for name, mine in gradients[0].items():
            other = gradients[1][name]
            assert mine is not None, f"{name} has no gradient"
            assert other is not None, f"{name} has no gradient with checkpointing"
            assert apart(other, mine) < CLOSE, f"{name}: checkpointing changes its gradient"


class _Foreign(AdaptedLinear):
    """Another plugin's adapter."""

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return y

    def merged_weight(self) -> torch.Tensor:
        return weight_of(self.base)

    def adapter_state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_adapter_state(self, state: Any) -> None:
        del state


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of `model`: trained parameters and persistent buffers."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in frozen}


def loss_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the mean loss of a fixed batch."""
    loss: torch.Tensor = model(IDS, labels=IDS, use_cache=False).loss
    return loss


def skip_without_layers(model: nn.Module) -> None:
    """End a check that is about `AdaptedLinear` where there is none."""
    if not adapted_layers(model):
        pytest.skip("it changes no linear layer")
