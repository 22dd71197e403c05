"""From what a person calls a model to a transformers folder or hub name, and an adapter folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier.errors import ConfigError, ModelError, nearest
from luthier.registry import catalogue
from luthier.system import read_table

ADAPTER_CONFIG = "adapter_config.json"
_TABLES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_EXPECTED = "a transformers folder, a hub name, a .gguf file, a run folder or a PEFT folder"


class Named(Protocol):
    """The options that say which model: see `luthier.config.ModelConfig`."""

    path: str | None
    gguf_package: str | None
    adapter: str | None


@dataclass(frozen=True)
class Source:
    """What to load.

    Attributes:
        base: A transformers folder with safetensors, absolute, or a hub name.
        adapter: A PEFT folder to load on it.
    """

    base: str
    adapter: Path | None = None


def find_source(config: Named) -> Source:
    """Follow `config` to the base model and the adapter on it; GGUF files are converted.

    Raises:
        ConfigError: No model, two models or two adapters are named.
        ModelError: Something is not there, or in a format that is refused.
    """
    if config.gguf_package:
        if config.path:
            raise ConfigError(f"model.path={config.path} and model.gguf_package={config.gguf_package} are "
                              "two models; set one of them to null")  # fmt: skip
        folder = catalogue().hooks.hook.find_model(name=None, package=config.gguf_package)
        if folder is None:
            raise ConfigError(f"no plugin reads model.gguf_package={config.gguf_package}")
        source = Source(str(folder))
    elif config.path and config.path != "???":
        source = _follow(config.path)
    else:
        raise ConfigError(f"no model: give model.path=…, {_EXPECTED}")
    if not config.adapter:
        return source
    if source.adapter is not None:
        raise ConfigError(f"model.path={config.path} is an adapter and model.adapter={config.adapter} "
                          "another; one can be loaded")  # fmt: skip
    return Source(source.base, _adapter_folder(config.adapter))


def _follow(path: str, above: Path | None = None) -> Source:
    place = Path(path).expanduser()
    if (folder := catalogue().hooks.hook.find_model(name=path, package=None)) is not None:
        return Source(str(folder))
    if not place.is_dir():
        return _hub_name(path, place)
    place = _result_of(place)
    if not (place / ADAPTER_CONFIG).is_file():
        _check_safetensors(place)
        return Source(str(place.resolve()))
    if above is not None:
        raise ModelError(f"{above} is an adapter on another adapter, {place}; only one can be loaded")
    base = read_table(place / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{place}: {ADAPTER_CONFIG} names no base model; "
                         f"give model.path=BASE model.adapter={path}")  # fmt: skip
    try:
        below = _follow(base, place)
    except ModelError as error:
        raise ModelError(f"the base of {place} cannot be used ({error}); "
                         f"give model.path=BASE model.adapter={path}") from error  # fmt: skip
    return Source(below.base, place)


def _hub_name(path: str, place: Path) -> Source:
    """Take `path` for a hub name unless it can only be a place on this machine."""
    if path.startswith((".", "~", "/")) or path.count("/") > 1 or place.exists():
        siblings = map(str, place.parent.iterdir()) if place.parent.is_dir() else ()
        hint = nearest(str(place), list(siblings))
        raise ModelError(f"model.path={path} is not there: {hint}expected {_EXPECTED}")
    return Source(path)


def _adapter_folder(path: str) -> Path:
    folder = _result_of(Path(path).expanduser())
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"model.adapter={path} holds no {ADAPTER_CONFIG}; expected a PEFT or run folder")
    return folder


def _result_of(place: Path) -> Path:
    """Return the result in a run folder, or `place` itself."""
    has_model = any((place / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    return place / "model" if not has_model and (place / "model").is_dir() else place


def _check_safetensors(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; expected {_EXPECTED}")
    for table in _TABLES:
        if (folder / table).is_file():
            read_table(folder / table)
    for index in folder.rglob("*.safetensors.index.json"):  # a config may name another than the usual one
        _check_index(index)
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        convert = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}-safetensors')"
        )
        raise ModelError(f"{folder} holds pickled weights, which can run code when loaded, and no "
                         f'safetensors. If you trust it, convert it: python -c "{convert}"')  # fmt: skip
    raise ModelError(f"{folder} holds no *.safetensors; expected {_EXPECTED}")


def _check_index(index: Path) -> None:
    """Refuse shards that are no safetensors in the folder: transformers would unpickle what it names."""
    shards = read_table(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{index} is damaged: expected a weight_map")
    for shard in shards.values():
        if not (isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")):
            raise ModelError(f"{index} names {shard}; expected *.safetensors in the same folder")
