"""The command line: ``luthier VERB [hydra overrides]``. The only place that reads ``sys.argv``."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from luthier.errors import LuthierError, unknown
from luthier.registry import command, command_names

USAGE = """\
Luthier fine-tunes and aligns language models; every method is a plugin.

usage: luthier VERB [options]

  train      fine-tune: model × quantiser × adapter × optimiser × objective × data
  preview    the first examples as the model will see them, what is trained marked
  plan       what a run takes and what fits, from shapes alone: nothing is downloaded
  evaluate   loss, perplexity and verified answers of a model on held-out rows
  sample     answers to prompts, scored: as candidates, preference pairs or rows to train on
  merge      several models or adapters as one: soup, task arithmetic, TIES, DARE, in bounded memory
  fold       an adapter and its base made one plain model, with the error of rounding layer by layer
  plugins    what is registered, from which package and version

  luthier VERB --help           the verb's groups and options, each with its default
  luthier train recipe=quickstart
  luthier train model.path=FOLDER data=jsonl data.path=rows.jsonl adapter.rank=8
  luthier preview model.path=FOLDER data=jsonl data.path=rows.jsonl                what would be trained on
  luthier plan model=llama3_70b quantiser=nf4 adapter=lora model.device=cuda memory_gb=48         does it fit?
  luthier fold model.path=RUN out=FOLDER                           a model without adapter, for any program
  luthier merge 'models=[runs/one,runs/two]' merger=ties base=FOLDER run_dir=runs/merged
  luthier train -m adapter=lora,full optimiser.lr=1e-4,3e-4 …      one run for each combination
  luthier plugins new optimiser NAME                               a package with a method of your own

Environment: LUTHIER_PLUGINS (third-party distributions to load; empty: none), LUTHIER_BLOCKED (ones to
leave out), LUTHIER_CACHE (converted models), LUTHIER_TRACEBACK=1 (whole tracebacks)."""


def main(argv: list[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 a run of a multirun failed, 2 something a person can mend."""
    arguments = sys.argv[1:] if argv is None else argv
    sys.exit(report(lambda: dispatch(arguments)))


def report(action: Callable[[], int]) -> int:
    """Call `action`; an error a person can cause becomes one line on stderr and its exit status, mostly 2."""
    try:
        return action()
    except LuthierError as error:
        if os.environ.get("LUTHIER_TRACEBACK"):
            raise
        print(f"luthier: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("luthier: interrupted", file=sys.stderr)
        return 130


def dispatch(arguments: list[str]) -> int:
    """Run the verb that `arguments` begin with and return the exit status."""
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(f"luthier {version('luthier')}")
        return 0
    if verb not in command_names():
        raise LuthierError(unknown("verb", verb, command_names()))
    return _run(verb, rest)


def _run(verb: str, overrides: list[str]) -> int:
    quieten()
    # Importing torch takes a second or two, so the verbs that need it import it here. Nothing of it is
    # garbage, and looking for some would take another one.
    gc.disable()
    with _interrupted_afterwards():
        chosen = command(verb)
        if chosen.composed:
            from luthier import config
            from luthier.commands.help import show_usage
            from luthier.commands.launch import launch

            config.prepare()
    gc.freeze()
    gc.enable()
    if not chosen.composed:
        return int(chosen.run(overrides))
    if "-h" in overrides or "--help" in overrides:
        return show_usage(verb, [override for override in overrides if override not in ("-h", "--help")])
    if {"-m", "--multirun"} & set(overrides) and (reason := chosen.multirun):
        raise LuthierError(f"{verb} {reason}; leave out -m and give one value each")
    return launch(verb, overrides)


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Hold Ctrl-C back while modules are imported, as some swallow it and the program goes on.

    Pressed once more, it counts at once.
    """
    theirs = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if theirs or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = threading.Event()

    def hold(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt


def run_job(verb: str, plain: dict[str, Any]) -> None:
    """Run one composed job of a multirun in this process, which is its own, and exit as `main` does."""
    quieten()
    from omegaconf import OmegaConf

    from luthier import config

    config.prepare()

    def job() -> int:
        composed = OmegaConf.create(plain)
        config.validate(verb, composed)
        command(verb).run(composed)
        return 0

    sys.exit(report(job))


def quieten() -> None:
    """Keep one library from warning, whenever it is imported, of a kernel that nothing asked for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
