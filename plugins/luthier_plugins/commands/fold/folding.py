"""`fold`: an adapter and its base as one plain model, with what rounding costs, layer by layer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]

from luthier import config as configs
from luthier.adapters import (
    AdaptedLinear,
    adapted_layers,
    adapted_modules,
    replace,
    settle,
    weight_in_use,
    write_weight,
)
from luthier.config import ModelConfig
from luthier.contracts import Quantiser
from luthier.errors import ConfigError, ModelError, unknown
from luthier.models import LoadedModel, Source, find_source, grow, load_config, load_model
from luthier.runs import as_json, remove_leftovers, write_json, writing
from luthier.system import DTYPES, written_whole
from luthier_plugins.commands.fold.report import REPORT, FoldedLayer, FoldReport
from luthier_plugins.commands.fold.table import show_fold
from luthier_toolkits.saving import save_model

log = logging.getLogger("luthier")
BASES = ("original", "dequantised")


def fold(config: DictConfig) -> FoldReport:
    """Write `config.model`, an adapter on its base, as one plain model; print and return what it cost.

    Args:
        config: What `luthier.compose("fold", overrides)` returns.

    Raises:
        LuthierError: Something a person can mend; one line says what, where and how.
    """
    source = _checked(config)
    out = Path(config.out).expanduser()
    remove_leftovers(out.parent, out.name)
    quantiser: Quantiser | None = None
    if config.quantiser:
        quantiser = configs.build("quantiser", config.quantiser)
    run = _run_config(source.adapter)
    _warn(config, run)
    dtype, dequantised = DTYPES[config.dtype], config.base == "dequantised"
    original = _load_original(config, source, dtype, with_adapter=not dequantised)
    quantised = _load_quantised(config, source, run, quantiser, with_adapter=dequantised)
    trained = quantised if quantised is not None and dequantised else original
    layers = tuple(_fold_parameters(original, trained, dtype))
    layers += tuple(_fold_layers(original, trained, quantised, dtype))
    rest = _dequantise_rest(original, quantised) if quantised is not None and dequantised else 0
    options: Any = OmegaConf.to_container(config.quantiser) if config.quantiser else None
    report = FoldReport(out, config.base, config.dtype, options, layers, rest, _mean(layers))
    with writing(out, "make room and repeat the command"), written_whole(out) as fresh:
        save_model(original.model, trained.tokenizer, fresh / "model", dtype)
        for file in (fresh / "model").iterdir():
            file.rename(fresh / file.name)
        (fresh / "model").rmdir()
        write_json(fresh / REPORT, as_json(report))
    show_fold(report)
    return report


def _checked(config: DictConfig) -> Source:
    """Return what to fold, once the options are looked at."""
    if OmegaConf.is_missing(config, "out") or not config.out:
        raise ConfigError("out=FOLDER must be set: where the folded model is written")
    if config.base not in BASES:
        raise ConfigError(unknown("base", str(config.base), BASES))
    if config.dtype not in DTYPES:
        raise ConfigError(unknown("dtype", str(config.dtype), DTYPES))
    if config.base == "dequantised" and not config.quantiser:
        raise ConfigError(
            "base=dequantised needs the quantiser that the adapter was trained over: quantiser=NAME with the "
            "options of that run; base=original needs none"
        )
    out = Path(config.out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"out={config.out} is there and not empty; choose another folder")
    source = find_source(config.model)
    if source.adapter is None:
        raise ModelError(
            f"{source.base} has no adapter to fold; give model.path=RUN or a PEFT folder, or "
            "model.adapter=ADAPTER besides"
        )
    return source


def _run_config(adapter: Path | None) -> dict[str, Any] | None:
    """Return the config of the run that trained `adapter`, where it lies in a run folder."""
    file = Path() if adapter is None else adapter.parent / "config.yaml"
    if not file.is_file():
        return None
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, YAMLError, OmegaConfBaseException):  # no run's, or none that can be read
        return None
    return plain if isinstance(plain, dict) and {"adapter", "model"} <= plain.keys() else None


def _warn(config: DictConfig, run: dict[str, Any] | None) -> None:
    """Say where the base is not the one that the adapter was trained on."""
    if run is None:
        return
    trained = run.get("quantiser")
    named: Any = OmegaConf.to_container(config.quantiser) if config.quantiser else None
    if trained and not named:
        log.warning(
            "the adapter was trained over quantiser=%s, and is folded into the original weights, which it "
            "never saw: quantiser=%s says how far apart they are, with base=dequantised it is folded into "
            "those of training",
            trained["name"],
            trained["name"],
        )
    elif named and named != trained:
        over = f"quantiser {json.dumps(trained)}" if trained else "no quantiser"
        log.warning("the adapter was trained over %s, and is folded with %s", over, json.dumps(named))


def _load_original(config: DictConfig, source: Source, dtype: torch.dtype, with_adapter: bool) -> LoadedModel:
    """Load the base unquantised, in a dtype that holds both its own weights and what is written."""
    own = load_config(source.base, config.model.revision).dtype or torch.float32
    model_config = _part(config, source, torch.promote_types(own, dtype), with_adapter)
    loaded = load_model(model_config, train_base=False)
    if loaded.quantised:
        raise ModelError(
            f"{source.base}: it is quantised, and there is no original to fold into; give "
            "model.path=BASE model.adapter=ADAPTER with the base in full precision, and quantiser=NAME"
        )
    return loaded


def _load_quantised(
    config: DictConfig,
    source: Source,
    run: dict[str, Any] | None,
    quantiser: Quantiser | None,
    with_adapter: bool,
) -> LoadedModel | None:
    if quantiser is None:
        return None
    name = config.model.dtype
    if name == "auto" and run is not None:
        name = run["model"]["dtype"]
    return load_model(_part(config, source, name, with_adapter), train_base=False, quantiser=quantiser)


def _part(config: DictConfig, source: Source, dtype: torch.dtype | str, with_adapter: bool) -> ModelConfig:
    return ModelConfig(
        path=source.base,
        adapter=str(source.adapter) if with_adapter else None,
        dtype=str(dtype).removeprefix("torch."),
        device=config.model.device,
        revision=config.model.revision,
        chat_template=config.model.chat_template,
        new_tokens=list(config.model.new_tokens),
        resize=config.model.resize,
    )


@torch.no_grad()
def _fold_parameters(
    original: LoadedModel, trained: LoadedModel, dtype: torch.dtype
) -> Iterator[FoldedLayer]:
    """Write the parameters that `trained` changes as a whole, embeddings or experts, into `original`."""
    for place, module in adapted_modules(trained.model).items():
        for name in module.changes:
            base, merged = module.base.get_parameter(name).float(), module.value(name, torch.float32)
            yield _measured(f"{place.removesuffix('.base')}.{name}", base, merged, dtype, None)
    if original is not trained:
        grow(original.model, len(trained.model.get_input_embeddings().weight))
    settle(trained.model, None if original is trained else original.model)


@torch.no_grad()
def _fold_layers(
    original: LoadedModel, trained: LoadedModel, quantised: LoadedModel | None, dtype: torch.dtype
) -> Iterator[FoldedLayer]:
    """Fold every adapted layer of `trained` into `original`, one after the other, and measure it."""
    for name, layer in adapted_layers(trained.model).items():
        target = _plain(original.model, name)
        own, base = weight_in_use(target), layer.base_weight()
        quantisation = None
        if quantised is not None:
            stored = weight_in_use(_plain(quantised.model, name))
            quantisation = _ratio(stored - own, own)
        merged = layer.merged_weight()
        # Measured before it is written: of an fp32 layer, `own` and `base` are the very weight.
        measured = _measured(name, base, merged, dtype, quantisation)
        write_weight(target, merged)
        replace(original.model, name, target)
        yield measured


def _measured(
    name: str, base: torch.Tensor, merged: torch.Tensor, dtype: torch.dtype, quantisation: float | None
) -> FoldedLayer:
    """Return what folding does to a weight, and rounding to that."""
    rounding, update = merged.to(dtype).float() - merged, merged - base
    return FoldedLayer(
        name,
        update=_ratio(update, base) or 0.0,
        rounding_of_update=_ratio(rounding, update),
        rounding_of_weight=_ratio(rounding, merged) or 0.0,
        quantisation=quantisation,
    )


def _dequantise_rest(original: LoadedModel, quantised: LoadedModel) -> int:
    """Write what `quantised` computes with where it has no adapter; return how many layers that were."""
    count = 0
    adapted = adapted_layers(quantised.model)
    inside = tuple(f"{name}." for name in adapted)
    for name, layer in quantised.model.named_modules():
        if not isinstance(layer, nn.Linear) or name.startswith(inside) or type(layer) is nn.Linear:
            continue
        write_weight(_plain(original.model, name), weight_in_use(layer))
        count += 1
    return count


def _plain(model: nn.Module, name: str) -> nn.Module:
    """Return the linear layer called `name`, out of its adapter."""
    layer = model.get_submodule(name)
    return layer.base if isinstance(layer, AdaptedLinear) else layer


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    size = float(whole.norm())
    return float(part.norm()) / size if size else None


def _mean(layers: tuple[FoldedLayer, ...]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for key in ("update", "rounding_of_update", "rounding_of_weight", "quantisation"):
        values = [value for layer in layers if (value := getattr(layer, key)) is not None]
        means[key] = sum(values) / len(values) if values else None
    return means
