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
        if not lines or lines[0].get("merge") != digest:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._append([{"merge": digest}])
        for line in lines[1:] if self._same(lines, digest) else []:
            self.done[line["name"]] = MergedTensor(**line)

    @staticmethod
    def _same(lines: Sequence[dict[str, Any]], digest: str) -> bool:
        return bool(lines) and lines[0].get("merge") == digest

    def add(self, tensors: Sequence[MergedTensor]) -> None:
        """Record tensors that are on the disk."""
        self._append([dataclasses.asdict(one) for one in tensors])
        self.done |= {one.name: one for one in tensors}

    def close(self) -> None:
        """Forget: the result is whole."""
        self._file.unlink(missing_ok=True)

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    def _lines(self) -> list[dict[str, Any]]:
        """Return the whole lines; a kill may have cut the last one."""
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return []
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found


def digest_of(
    config: DictConfig, inputs: Sequence[MergeInput], base: MergeInput | None, layout: Layout
) -> str:
    """Return what tells a merge from any other: options, files with sizes and times, and the layout."""
    models = {one.label: _files(one) for one in (*inputs, *([base] if base else []))}
    options = [OmegaConf.to_container(config.merger), config.missing]
    tensors = {name: [str(one.dtype), one.shape, one.file.name] for name, one in layout.tensors.items()}
    text = json.dumps([models, options, tensors], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(model: MergeInput) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in model.weight_files]
