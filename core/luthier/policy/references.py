"""What the reference gives to completions: measured once, remembered by contents, in memory and in a file."""

from __future__ import annotations

import hashlib
import math
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.adapters import adapted
from luthier.errors import LuthierError, ModelError
from luthier.system import locked
from luthier.trees import Branch, Pack, Tree

SAMPLED = 4096
"""Elements of a tensor whose places count in a fingerprint; of all others only the sum does."""


@dataclass(frozen=True)
class References:
    """Log-probabilities of completions under the reference, each a sum over its scored tokens.

    Attributes:
        keys: (n,) int64 hashes of prompt and completion, ascending.
        values: (n,) float32, nats.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, values: Mapping[int, float]) -> References:
        """Return them from a mapping of keys."""
        keys = torch.tensor(list(values), dtype=torch.int64)
        order = keys.argsort()
        return cls(keys[order], torch.tensor(list(values.values()), dtype=torch.float32)[order])

    def sums(self, pack: Pack) -> Tensor:
        """Return (C,) float32, that of every child of `pack`, on its device.

        Raises:
            LuthierError: A child was never measured.
        """
        wanted = torch.tensor([key for tree in pack.trees for key in keys_of(tree)], dtype=torch.int64)
        places = self._places(wanted)
        if bool((places < 0).any()):
            tree = pack.trees[pack.tree_of[int((places < 0).nonzero()[0])]]
            raise LuthierError(f"{tree.origin}: the reference was not measured for this completion")
        return self.values[places].to(pack.input_ids.device)

    def missing(self, trees: Iterable[Tree]) -> Iterator[Tree]:
        """Yield `trees` with the branches alone that were never measured, each once, if there are any."""
        seen: set[int] = set()
        for tree in trees:
            keys = keys_of(tree)
            places = self._places(torch.tensor(keys, dtype=torch.int64)).tolist()
            lacking = []
            for branch, key, place in zip(tree.branches, keys, places, strict=True):
                if place < 0 and key not in seen:
                    lacking.append(branch)
                    seen.add(key)
            if lacking:
                yield replace(tree, branches=tuple(lacking))

    def plus(self, values: Mapping[int, float]) -> References:
        """Return these and others; what was known stays as it was."""
        more = References.of(values)
        new = self._places(more.keys) < 0
        keys = torch.cat([self.keys, more.keys[new]])
        order = keys.argsort()
        return References(keys[order], torch.cat([self.values, more.values[new]])[order])

    def _places(self, keys: Tensor) -> Tensor:
        """Return where each of `keys` stands, -1 where it does not."""
        if not len(self.keys):
            return torch.full_like(keys, -1)
        places = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        return torch.where(self.keys[places] == keys, places, -1)


def keys_of(tree: Tree) -> list[int]:
    """Return a hash of each branch with its prompt: of token ids and of which are scored."""
    prompt = hashlib.blake2b(array("i", tree.prompt).tobytes(), digest_size=8)
    return [_key(prompt.copy(), len(tree.prompt), branch) for branch in tree.branches]


def _key(start: hashlib.blake2b, length: int, branch: Branch) -> int:
    start.update(array("i", [-length, *branch.ids, -1, *branch.scored_places]).tobytes())
    return int.from_bytes(start.digest(), "little", signed=True)


@torch.no_grad()
def fingerprint(model: nn.Module, *computed: object) -> str:
    """Return a hash of the weights of `model`, and of what it is `computed` in, the same on every device.

    Every bit of a weight counts; its place does for a sample of each tensor, so that gigabytes take a second.
    Of layers whose adapter is switched off only the base counts: it is all that computes.
    """
    digest = hashlib.blake2b(repr(computed).encode(), digest_size=8)
    for name, tensor in sorted(_computing(model).items()):
        bits = _bits(tensor.detach())
        some = bits[:: math.ceil(len(bits) / SAMPLED) or 1].cpu()
        total = int(bits.sum(dtype=torch.int64)) if len(bits) else 0
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}".encode())
        digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _computing(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `model` by name, without adapters that are off and as if they had never been."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for layer, module in reversed(adapted(model).items()):  # one may be inside another
        if not module.enabled:
            inside = {name: tensors.pop(name) for name in [*tensors] if name.startswith(f"{layer}.")}
            base = f"{layer}.base."
            tensors |= {
                name.replace(base, f"{layer}.", 1): t for name, t in inside.items() if name.startswith(base)
            }
    return tensors


def _bits(tensor: Tensor) -> Tensor:
    """Return the contents of `tensor` as integers of its width, in one row."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.contiguous().flatten()
    return flat.to(torch.uint8) if flat.dtype == torch.bool else flat.view(integers[flat.element_size()])


def file_of(folder: Path, model: str) -> Path:
    """Return where `folder` keeps what the model of that fingerprint gave."""
    return folder / f"reference-{model}.safetensors"


def load_references(folder: Path, model: str) -> References:
    """Return what `folder` remembers of the model of that fingerprint: nothing, if it has no file.

    Raises:
        ModelError: The file is damaged.
    """
    file = file_of(folder, model)
    if not file.is_file():
        return References.of({})
    try:
        with safe_open(file, framework="pt") as stored:
            return References(stored.get_tensor("keys"), stored.get_tensor("values"))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged ({error}): remove it, and it is measured again") from error


def save_references(references: References, folder: Path, model: str) -> None:
    """Write the file of `load`, whole or not at all.

    Raises:
        LuthierError: It cannot be written.
    """
    file = file_of(folder, model)
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.new")  # several runs may share a folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.touch()
        with locked(draft):
            save_file({"keys": references.keys, "values": references.values}, draft)
            draft.replace(file)
    except (SafetensorError, OSError) as error:
        raise LuthierError(f"{file} cannot be written: {error}") from error


def other_references(folder: Path, model: str) -> Sequence[Path]:
    """Return the files in `folder` that hold what other models gave."""
    return [path for path in folder.glob("reference-*.safetensors") if path != file_of(folder, model)]
