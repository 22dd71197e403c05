"""One step's gradients, as every process count and packing should give them: ``one_step.py FOLDER CONFIG…``.

Started by `core/system/test_processes.py`, alone or under `accelerate launch`.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

import luthier
from luthier.commands.train import _Training
from luthier.engine.loop import accumulate, normalise
from luthier.engine.monitors import Monitor
from luthier.system.processes import Processes, whole_tensor
from luthier.trees.tree import cut


def gradients(run, pack_tokens):
    """Return every whole gradient of a step over all rows, and its norm."""
    trees = [run.rows.data.trees[i] for i in range(len(run.rows.data))]
    packs = [[trees[i] for i in pack] for pack in cut(trees, pack_tokens, run.processes.count)]
    weight = accumulate(run.policy, run.objective, run.processes.share(packs), Monitor())
    model = run.loaded.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = normalise(parameters, run.processes.sum_gradients(parameters, weight), None)
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
        run = _Training.prepare(config, Path(folder), processes).run
        found = {**gradients(run, 256), **gradients(run, 2048)}
        if processes.main:
            save_file(
                {name: tensor.contiguous() for name, tensor in found.items()},
                f"{folder}/{adapter}.safetensors",
            )
        processes.gather(None)


if __name__ == "__main__":
    main()
