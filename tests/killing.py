"""Commands in forks of this process, killed or short of disk at any operation on files."""

import os
import resource
import signal
import sys
import traceback

from luthier.errors import LuthierError

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = (
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
)


def forked(*jobs) -> list[tuple[int, str]]:
    """Call every (action, audit hook) in a fork of its own, all at once.

    Returns:
        Of each its exit status (negative: the signal), and the error that ended it.
    """
    children = [_begun(action, hook) for action, hook in jobs]
    return [_ended(child, ear) for child, ear in children]


def _begun(action, hook) -> tuple[int, int]:
    ear, mouth = os.pipe()
    child = os.fork()
    if not child:
        status, said = 1, ""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            if hook:
                sys.addaudithook(hook)
            action()
            status = 0
        except LuthierError as error:
            status, said = error.status, str(error)
        except BaseException:  # noqa: BLE001 - a fork must end here
            said = traceback.format_exc()
        finally:
            os.write(mouth, said.encode()[:60000])
            os._exit(status)
    os.close(mouth)
    return child, ear


def _ended(child, ear) -> tuple[int, str]:
    with os.fdopen(ear, "rb") as stream:
        said = stream.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


class Operations:
    """Counts what changes files below `folder`, and kills before the `deadly` one.

    Attributes:
        seen: The operations, if `log` is given: one line each is written there.
    """

    def __init__(self, folder, deadly=None, log=None) -> None:
        self.folder, self.deadly, self.count = str(folder), deadly, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if log else None

    def __call__(self, event, arguments) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & WRITING):
                return
        elif event in EVENTS:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes) or self.folder not in os.fsdecode(path):
            return
        self.count += 1
        if self.log is not None:
            os.write(self.log, f"{event} {os.fsdecode(path)}\n".encode())
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


class ShortOfDisk:
    """Lets no file grow beyond `size` bytes once a path that holds `word` is touched."""

    def __init__(self, word, size) -> None:
        self.word, self.size = word, size

    def __call__(self, event, arguments) -> None:
        if event in ("open", "os.mkdir") and self.word in str(arguments[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
