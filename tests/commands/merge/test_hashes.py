"""Hashes of a merge's inputs: of what was opened, whatever happens meanwhile."""

import hashlib
import os
import threading

import pytest

from luthier import ModelError
from luthier_plugins.commands.merge.io import hashes as merge_hashes
from luthier_plugins.commands.merge.io.hashes import FileHashes, hashing


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of several blocks, and one that is empty."""
    monkeypatch.setattr(merge_hashes, "_BLOCK", 1000)
    found = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for number, file in enumerate(found):
        file.write_bytes(os.urandom(1234 * number))
    return found


def expected(files):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_digests_are_those_of_the_files(files):
    with hashing([one := FileHashes(files[:3]), other := FileHashes(files[1:])]):
        assert one.result() == expected(files[:3])
        assert other.result() == expected(files[1:])


def test_a_file_of_several_models_is_read_once(files, tmp_path, monkeypatch):
    (tmp_path / "link.safetensors").symlink_to(files[3])
    read = []
    digest = merge_hashes._digest
    monkeypatch.setattr(merge_hashes, "_digest", lambda *given: read.append(1) or digest(*given))
    with hashing(
        [
            FileHashes([files[3]]),
            FileHashes([files[3]]),
            linked := FileHashes([tmp_path / "link.safetensors"]),
        ]
    ):
        assert list(linked.result().values()) == list(expected(files[3:]).values())
    assert len(read) == 1


def test_a_file_that_takes_the_place_of_one_that_is_merged_is_not_hashed(files):
    before, one = expected(files), FileHashes(files)
    files[0].rename(files[2])
    files[1].unlink()
    with hashing([one]):
        assert one.result() == before


def test_a_file_that_is_written_to_meanwhile_is_named(files):
    with hashing([one := FileHashes(files)]):
        one.result()
        os.utime(files[2], ns=(0, 0))
        with pytest.raises(ModelError, match=r"2\.safetensors was written to while it was merged"):
            one.result()


def test_what_is_not_done_is_given_up(files, monkeypatch):
    monkeypatch.setattr(merge_hashes, "_digest", lambda descriptor, stopped: str(stopped.wait(10)))
    with pytest.raises(ZeroDivisionError), hashing([one := FileHashes(files)]):
        raise ZeroDivisionError
    first, *rest = one._begun.values()
    assert first.cancelled() or first.result(0) == "True"
    assert all(each.cancelled() for each in rest)
    assert not one._open


def test_a_digest_is_stopped_within_a_block(files):
    stopped = threading.Event()
    stopped.set()
    with files[3].open("rb") as stream, pytest.raises(merge_hashes.CancelledError):
        merge_hashes._digest(stream.fileno(), stopped)
