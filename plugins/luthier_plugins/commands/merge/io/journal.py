"""What of a merge is done and on the disk, so that one that was interrupted goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from luthier_plugins.commands.merge.io.inputs import MergeInput
from luthier_plugins.commands.merge.io.shard_writer import Layout
from luthier_plugins.commands.merge.run.tensor import MergedTensor

FILE = ".journal.jsonl"


class Journal:
    """Lives in the folder of an unfinished result; a folder of another merge is emptied.

    Attributes:
        done: The tensors that are on the disk.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self._file = folder / FILE
        self.done: dict[str, MergedTensor] = {}
        lines = self._lines()
        if lines and lines[0].get("merge") == digest:
            self.done = {line["name"]: MergedTensor(**line) for line in lines[1:]}
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._append([{"merge": digest}])

    def add(self, tensors: Sequence[MergedTensor]) -> None:
        """Record tensors that are on the disk."""
        self._append([dataclasses.asdict(tensor) for tensor in tensors])
        self.done |= {tensor.name: tensor for tensor in tensors}

    @staticmethod
    def forget(folder: Path) -> None:
        """Leave no trace in `folder`: the result is whole."""
        (folder / FILE).unlink(missing_ok=True)

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    def _lines(self) -> list[dict[str, Any]]:
        """Return the whole lines; one that a kill cut off is dropped."""
        try:
            text = self._file.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                self._file.write_text(whole, encoding="utf-8")
            return [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError):
            return []


def digest_of(
    config: DictConfig, inputs: Sequence[MergeInput], base: MergeInput | None, layout: Layout | None = None
) -> str:
    """Return what tells a merge from any other: options, files with sizes and times, the layout if any."""
    models = {model.label: _files(model) for model in (*inputs, *([base] if base else []))}
    options = [OmegaConf.to_container(config.merger), config.missing, config.result, config.rank]
    places = layout.tensors.items() if layout else ()
    tensors = {name: [str(place.dtype), place.shape, place.file.name] for name, place in places}
    text = json.dumps([models, options, tensors], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(model: MergeInput) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in model.weight_files]
