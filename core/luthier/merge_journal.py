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

from luthier.merge_inputs import MergeInput
from luthier.merge_tensor import MergedTensor
from luthier.shard_writer import Layout

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
        self._append([dataclasses.asdict(one) for one in tensors])
        self.done |= {one.name: one for one in tensors}

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
    models = {one.label: _files(one) for one in (*inputs, *([base] if base else []))}
    options = [OmegaConf.to_container(config.merger), config.missing, config.result, config.rank]
    places = layout.tensors.items() if layout else ()
    tensors = {name: [str(one.dtype), one.shape, one.file.name] for name, one in places}
    text = json.dumps([models, options, tensors], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(model: MergeInput) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in model.weight_files]
