"""One step's gradients, as every process count and packing should give them: ``one_step.py FOLDER CONFIG…``.

Started by `test_parallel.py`, alone or under `accelerate launch`.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

import luthier
from luthier.engine import accumulate, normalise
from luthier.meter import Meter
from luthier.parallel import Processes, whole_tensor
from luthier.training import _Training
from luthier.tree import cut


def gradients(training, pack_tokens):
    """Return every whole gradient of a step over all rows, and its norm."""
    trees = [training.data.trees[i] for i in range(len(training.data))]
    packs = [[trees[i] for i in pack] for pack in cut(trees, pack_tokens, training.processes.count)]
    weight = accumulate(training.policy, training.objective, training.processes.share(packs), Meter())
    model = training.loaded.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = normalise(parameters, training.processes.sum_gradients(parameters, weight), None)
    found = {
        f"{pack_tokens}.{n}": whole_tensor(p.grad) for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad()
    return {**found, f"{pack_tokens}.norm": norm.detach().reshape(1)}


def main() -> None:
    folder, *overrides = sys.argv[1:]
    processes = Processes.launched()
    # PiSSA's A and B both have gradients at the first step.
    for adapter, more in (("full", []), ("lora", ["adapter.init=pissa"])):
        config = luthier.compose("train", [*overrides, f"adapter={adapter}", *more])
        training = _Training.prepare(config, Path(folder), processes)
        found = {**gradients(training, 256), **gradients(training, 2048)}
        if processes.main:
            save_file(
                {name: tensor.contiguous() for name, tensor in found.items()},
                f"{folder}/{adapter}.safetensors",
            )
        processes.gather(None)


if __name__ == "__main__":
    main()
