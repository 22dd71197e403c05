"""A file of JSON lines that grows part by part; what was stopped goes on where it was.

The lines go to ``NAME.part``; beside it, ``NAME.part.json`` says how far they are whole, and what made them.
Who writes holds ``NAME.part.lock``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from luthier.errors import ConfigError

log = logging.getLogger("luthier")


@dataclass
class Journal:
    """A file that is being written.

    Attributes:
        out: The file it becomes.
        made: Says what makes it: only the same goes on with it.
        parts: How many parts are whole.
        state: What the last `add` was given to keep.
    """

    out: Path
    made: str
    parts: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find what was stopped, or begin.

        Raises:
            ConfigError: The file exists, cannot be or is being written, or something else was begun there.
        """
        self._draft = self.out.with_name(f"{self.out.name}.part")
        self._note = self.out.with_name(f"{self.out.name}.part.json")
        self._lock = FileLock(self.out.with_name(f"{self.out.name}.part.lock"), timeout=0)
        self._guarded(self._hold)
        try:
            # With its note alone beside it, it was finished by a command that was killed before its end.
            if self.out.exists() and (self._draft.exists() or not self._note.exists()):
                raise ConfigError(f"out={self.out} is there already; choose another file, or remove it")
            self._guarded(self._open)
        except BaseException:
            self._release()
            raise

    def add(self, lines: Iterable[dict[str, Any]], state: dict[str, Any]) -> None:
        """Append a part and remember `state`.

        Raises:
            ConfigError: It cannot be written.
        """
        self._guarded(self._append, lines, state)

    def close(self) -> None:
        """Give the file its name.

        Raises:
            ConfigError: It cannot be written.
        """
        if self._draft.exists():
            self._guarded(self._draft.replace, self.out)
        self._release()
        self._note.unlink(missing_ok=True)  # the last trace

    def abandon(self) -> None:
        """Leave nothing behind where no part is whole, so that the mended command begins anew."""
        if not self.parts:
            self._draft.unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)
        self._release()

    def _hold(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"out={self.out} is being written by a command that has not ended; wait, or choose another"
            ) from error

    def _release(self) -> None:
        # Removed while it is held: who opened it meanwhile finds the file that is made of it.
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _open(self) -> None:
        if not self._note.exists():
            self._draft.write_bytes(b"")
            return
        note = json.loads(self._note.read_text(encoding="utf-8"))
        if note["made"] != self.made:
            raise ConfigError(
                f"{self._note} is of a command with other options or rows, which was stopped; repeat "
                f"that one, choose another out, or remove {self._draft}*"
            )
        if not self.out.exists():
            with self._draft.open("r+b") as file:
                file.truncate(note["bytes"])
        self.parts, self.state = note["parts"], note["state"]
        log.info("%s: going on after %d parts that were written before", self.out, self.parts)

    def _append(self, lines: Iterable[dict[str, Any]], state: dict[str, Any]) -> None:
        with self._draft.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
            file.flush()
            size = file.tell()
        note = {"made": self.made, "parts": self.parts + 1, "bytes": size, "state": state}
        fresh = self._note.with_name(f"{self._note.name}.new")
        fresh.write_text(json.dumps(note), encoding="utf-8")
        fresh.replace(self._note)
        self.parts, self.state = self.parts + 1, state

    def _guarded(self, call: Any, *given: Any) -> None:
        try:
            call(*given)
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError) as error:
            said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise ConfigError(f"out={self.out} cannot be written: {said}") from error
