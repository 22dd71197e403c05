"""The suite of quantisers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.contracts import Quantiser
from luthier.models import from_pretrained
from luthier.testing.adapter_promise import logits
from luthier.testing.models import tiny_llama
from luthier.testing.suite import Suite, apart


class QuantiserSuite(Suite):
    """What a `luthier.Quantiser` promises, by loading a small Llama with it on the CPU.

    Attributes:
        tolerance: How far the logits may be from the unquantised model's, relative to the largest.
    """

    method: ClassVar[type[Quantiser]]
    tolerance: ClassVar[float] = 0.5

    def loaded(self, folder: Path) -> PreTrainedModel:
        """Return a Llama whose linear layers are 128 × 128 or more, saved and loaded with the quantiser."""
        dense = tiny_llama(hidden_size=128, intermediate_size=256, num_key_value_heads=4)
        dense.save_pretrained(folder)
        made = self.make()
        config = copy.deepcopy(dense.config)
        options = {"dtype": torch.float32, **made.load_options(config, torch.float32)}
        model: PreTrainedModel = from_pretrained(type(dense), str(folder), **options).eval()
        made.finish(model)
        return model

    def test_it_gives_keyword_arguments(self) -> None:
        """`load_options` returns keyword arguments by name and leaves the model's config as it is."""
        config = tiny_llama().config
        before = config.to_dict()
        options = self.make().load_options(config, torch.float32)
        assert isinstance(options, dict), f"load_options must return a dict, got {type(options).__name__}"
        assert options, "load_options is empty: the base would not be quantised"
        assert all(isinstance(key, str) for key in options), f"keyword arguments have names: {list(options)}"
        assert config.to_dict() == before, "load_options changed the config it was given; copy it"

    def test_the_loaded_model_is_near_the_original(self, tmp_path: Path) -> None:
        """Transformers loads the model with them, and its logits are finite and near the original's."""
        expected = logits(tiny_llama(hidden_size=128, intermediate_size=256, num_key_value_heads=4))
        actual = logits(self.loaded(tmp_path)).float()
        assert torch.isfinite(actual).all(), "the quantised model's logits are not finite"
        off = apart(actual, expected)
        assert off < self.tolerance, f"the logits are {off:.2f} off; allow more with tolerance, or mend it"

    def test_the_bits_it_plans_for_are_the_bits_it_takes(self, tmp_path: Path) -> None:
        """`bits_per_weight` is what a stored weight takes: at least its own bits, at most twice those."""
        planned = self.make().bits_per_weight()
        head, bits, weights = "lm_head", 0, 0
        for name, module in self.loaded(tmp_path).named_modules():
            if isinstance(module, nn.Linear) and name != head:
                bits += 8 * module.weight.numel() * module.weight.element_size()
                weights += module.in_features * module.out_features
        stored = bits / weights
        assert stored <= planned <= 2 * stored, f"bits_per_weight says {planned}, weights take {stored:.2f}"
        assert planned < 32, f"{planned} bits a weight is no saving over fp32"
