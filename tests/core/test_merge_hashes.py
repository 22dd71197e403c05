"""Hashes of a merge's inputs: the right ones, whoever works them out and whatever happens meanwhile."""

import hashlib
import os
import threading

import pytest

from luthier import merge_hashes
from luthier.merge_hashes import hashes_of, hashing, named_files


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files of several blocks, and one that is empty."""
    monkeypatch.setattr(merge_hashes, "_BLOCK", 1000)
    found = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for number, file in enumerate(found):
        file.write_bytes(os.urandom(1234 * number))
    return found


def expected(files):
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def held(monkeypatch):
    """Keep every digest waiting until the returned event is set; return it and the files that were begun."""
    go, begun, digest = threading.Event(), [], merge_hashes._digest

    def wait(file, stopped):
        begun.append(file)
        go.wait(10)
        return digest(file, stopped)

    monkeypatch.setattr(merge_hashes, "_digest", wait)
    return go, begun


def test_digests_are_those_of_the_files(files):
    assert hashes_of(files, 2) == expected(files)
    with hashing(files[:2]):
        assert hashes_of(files, 2) == expected(files)


def test_what_was_begun_is_not_done_again(files, monkeypatch):
    go, begun = held(monkeypatch)
    with hashing(files), hashing(files):
        go.set()
        assert hashes_of(files, 2) == expected(files)
    assert sorted(begun) == files


def test_a_file_that_changed_is_hashed_again(files):
    with hashing(files):
        hashes_of(files, 1)
        files[1].write_bytes(b"other")
        assert hashes_of(files, 1) == expected(files)


def test_the_rest_is_given_up_and_nothing_half_done_is_kept(files, monkeypatch):
    monkeypatch.setattr(merge_hashes, "_digest", lambda file, stopped: str(stopped.wait(10)))
    with hashing(files):
        first, *rest = merge_hashes._begun.values()
    assert first.result(0) == "True"
    assert all(one.cancelled() for one in rest)
    assert not merge_hashes._begun
    monkeypatch.undo()
    assert hashes_of(files, 1) == expected(files)


def test_a_digest_that_was_stopped_is_none(files):
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(merge_hashes.CancelledError):
        merge_hashes._digest(files[3], stopped)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["models=[{0}/one,{0}/run]", "base={0}/two"], ["one", "run/model", "two", "two"]),
        (["models={{a: {0}/one, b: '{0}/two'}}", "merger=ties"], ["one", "two", "two"]),
        (["models=[hub/name,{0}/nowhere]", "base=null"], []),
        (["models={0}/one,{0}/two"], []),
        (["models=[", "what"], []),
    ],
)
def test_the_command_line_names_the_files(tmp_path, overrides, names):
    for folder, count in (("one", 1), ("two", 2), ("run/model", 1)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / folder / f"model-{number}.safetensors").touch()
    found = named_files([one.format(tmp_path) for one in overrides])
    assert [str(file.parent.relative_to(tmp_path)) for file in found] == names
