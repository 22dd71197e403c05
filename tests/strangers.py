"""Third-party distributions made on the spot: metadata and modules in a folder put on ``sys.path``."""

import contextlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest


class Strangers:
    """Installs throw-away distributions for one test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(str(folder))

    def install(
        self,
        name: str,
        entries: dict[str, str],
        modules: dict[str, str],
        requires: str = "",
        version: str = "0.2",
    ) -> None:
        """Install `name`: `entries` maps entry points to modules, `modules` maps files to their source."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        need = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{need}")
        lines = "".join(f"{entry} = {module}\n" for entry, module in entries.items())
        (info / "entry_points.txt").write_text(f"[luthier]\n{lines}")
        for file, text in modules.items():
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
            module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            self.monkeypatch.delitem(sys.modules, module, raising=False)

    @contextlib.contextmanager
    def in_catalogue(self) -> Iterator[None]:
        """Let the catalogue and Hydra's store of this process have them, for the block alone."""
        from hydra.core.config_store import ConfigStore
        from hydra.core.plugins import Plugins

        from luthier.config import prepare
        from luthier.registry import catalogue, commands

        def forget() -> None:
            catalogue.cache_clear()
            commands.cache_clear()
            prepare.cache_clear()

        Plugins.instance()  # puts its own into the store, which must stay
        store = ConfigStore.instance()
        before = store.repo
        store.repo = _copied(before)
        forget()
        try:
            yield
        finally:
            store.repo = before
            forget()


def _copied(tree: object) -> object:
    """Copy the dictionaries of a tree and share its leaves."""
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


OPTIMISER = """
    from dataclasses import dataclass
    import torch
    from luthier import Optimiser, hookimpl, option

    @dataclass(frozen=True)
    class Sgd(Optimiser):
        '''Plain gradient descent.'''
        lr: float = option(0.1, "Step size.")
        def build(self, parameters):
            return torch.optim.SGD([p for _, p in parameters], lr=self.lr)
        def state_bytes(self, name, shape):
            return 0.0

    @hookimpl
    def register_optimisers(register):
        register("NAME", Sgd)
"""
