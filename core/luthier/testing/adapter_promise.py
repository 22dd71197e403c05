"""What adapters promise to everyone: what is saved is what was trained."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import luthier
from luthier.adapters import PeftAdapter, fold
from luthier.contracts import Adapter
from luthier.errors import ConfigError
from luthier.models import adapter_readers
from luthier.testing.models import FAMILIES, tiny_gpt2, tiny_llama, tiny_moe, tiny_tokenizer
from luthier.testing.suite import Suite, apart

IDS = torch.arange(3, 27).view(2, 12)
CLOSE = 1e-5
PROMISED: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama, tied": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "gpt2, untied": lambda: tiny_gpt2(tie_word_embeddings=False),  # Linear beside Conv1D
    **{family: functools.partial(tiny_moe, family) for family in FAMILIES},
}


class AdapterPromise(Suite):
    """The end of `luthier.testing.AdapterSuite`: the folder that was saved, read in every way there is."""

    method: ClassVar[type[Adapter]]

    def trained(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return `model` with the adapter attached and trained, in eval mode."""
        raise NotImplementedError

    @pytest.mark.parametrize("base", sorted(PROMISED))
    def test_what_was_saved_is_what_was_trained_for_everyone(
        self, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Read by Luthier and by peft, folded and merged, what was saved gives the trained model's logits.

        On all kinds of models that the options fit. What peft would read differently, a warning says.
        """
        made, place = self.make(), tmp_path / "saved"
        if not isinstance(made, PeftAdapter):
            pytest.skip("it is saved as a whole model")
        make = PROMISED[base]
        try:
            model = self.trained(make())
        except ConfigError as error:
            pytest.skip(f"its options do not fit: {error}")
        make().save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        expected = logits(model)
        with caplog.at_level(logging.WARNING, "luthier"):
            made.save(model, place, str(tmp_path / "base"))
        found = {"Luthier": logits(_read(type(made), make(), place))}
        if _is_pefts(made) and "peft" not in caplog.text:
            found["peft"] = logits(_read_by_peft(make(), place))
        back = _read(type(made), make(), place)
        fold(back, torch.float32)
        found["folded"] = logits(back)
        if made.peft_kind in adapter_readers():
            found["merged"] = logits(_merged(place, tmp_path / "run"))
        for way, values in found.items():
            off = apart(values, expected)
            assert off < 10 * CLOSE, f"{way}, the logits on {base} are {off:.1e} off those that were trained"


def _read(method: type[Adapter], model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    method.load(model, folder, trainable=False)
    return model


def _is_pefts(made: PeftAdapter) -> bool:
    """Whether peft has such adapters."""
    peft = pytest.importorskip("peft")
    return str(made.peft_kind).partition("+")[0] in peft.PeftType.__members__


def _read_by_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D beside Linear
        read: PreTrainedModel = peft.PeftModel.from_pretrained(model, folder).eval()
    return read


def _merged(folder: Path, run_dir: Path) -> PreTrainedModel:
    """Return the mean of an adapter and itself, merged into its base."""
    luthier.merge(luthier.compose("merge", [
        f"models={{one: {folder}, two: {folder}}}", "merger=soup", f"run_dir={run_dir}",
    ]))  # fmt: skip
    merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    return merged


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of a fixed batch, without gradients."""
    with torch.no_grad():
        values: torch.Tensor = model(IDS, use_cache=False).logits
    return values
