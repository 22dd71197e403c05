"""How far two models are apart: ``python -m bench.same_weights ONE OTHER`` prints it as JSON."""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

CLOSE = 1e-6


def tensors(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def compare(one: Path, other: Path) -> dict[str, float]:
    """Return the largest distance of two elements, and the share of those that are not `CLOSE`.

    Raises:
        ValueError: They have other tensors.
    """
    mine, theirs = tensors(one), tensors(other)
    if mine.keys() != theirs.keys():
        raise ValueError(f"{one} and {other} differ in {sorted(mine.keys() ^ theirs.keys())}")
    furthest, apart, count = 0.0, 0, 0
    for name in mine:
        with safe_open(mine[name], "pt") as a, safe_open(theirs[name], "pt") as b:
            distance = (a.get_tensor(name).float() - b.get_tensor(name).float()).abs()
        furthest = max(furthest, float(distance.max()))
        apart += int(torch.count_nonzero(distance > CLOSE))
        count += distance.numel()
    return {"furthest": furthest, "apart": apart / count}


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
