"""Compose a training run and print its optimiser: a module for `forked.Command`."""

import sys

from luthier import compose
from luthier.errors import LuthierError


def main() -> None:
    """Print the options of the optimiser, or the error."""
    try:
        config = compose("train", ["data=jsonl", "data.path=x", "model.path=m", *sys.argv[1:]])
        sys.stdout.write(f"{config.optimiser}\n")
    except LuthierError as error:
        sys.stdout.write(f"{type(error).__name__} {error}\n")
