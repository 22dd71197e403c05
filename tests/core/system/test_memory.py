"""Memory in use: what is held counts, what was freed does not, whether the allocator keeps it or not."""

import ctypes
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from luthier.system.memory import Watch, in_use, peak_memory_mb

MB = 2**20
pytestmark = pytest.mark.skipif(in_use() is None, reason="this system does not say what is in use")


def test_blocks_that_are_freed_are_not_in_use_though_the_process_keeps_them():
    # In a process of its own, as what others leave in a heap, and how full it is, differs by some MiB.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(check_blocks_that_are_freed).result()


def check_blocks_that_are_freed():
    ctypes.CDLL(None).malloc_trim(0)
    before = in_use()
    # Below 128 KiB, so that glibc takes them from its heap, whatever was freed before.
    blocks = [torch.ones(MB // 40) for _ in range(1000)]
    assert in_use() - before == pytest.approx(100 * MB, rel=0.05)
    del blocks[::2]  # holes, which cannot be given back
    assert in_use() - before == pytest.approx(50 * MB, rel=0.05)
    ctypes.CDLL(None).malloc_trim(0)  # free, but no longer resident
    assert in_use() - before == pytest.approx(50 * MB, rel=0.05)
    large = torch.ones(25 * MB)
    assert in_use() - before == pytest.approx(150 * MB, rel=0.05)
    del large


def test_a_watch_remembers_the_most_it_saw():
    watch = Watch(torch.device("cpu"))
    assert watch.highest_mb is None
    large = torch.ones(25 * MB)
    watch.look(10)
    del large
    watch.look(10)
    assert watch.highest_mb == pytest.approx(in_use() / MB + 100, rel=0.05)
    assert watch.highest_mb <= peak_memory_mb(torch.device("cpu"))


def test_smaller_packs_are_passed_over_after_a_while(monkeypatch):
    looks = []
    monkeypatch.setattr("luthier.system.memory.in_use", lambda: looks.append(1) or 1.0)
    watch = Watch(torch.device("cpu"))
    for _ in range(100):
        watch.look(50)
    often = len(looks)
    assert often == 100  # none is smaller than the largest
    for _ in range(100):
        watch.look(49)
    assert len(looks) == often


def test_another_system_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("luthier.system.memory._STATM", tmp_path / "none")
    assert in_use() is None
    watch = Watch(torch.device("cpu"))
    watch.look(1)
    assert watch.highest_mb is None
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts in bytes
    assert peak_memory_mb(torch.device("cpu")) > 0


def test_on_cuda_the_allocator_says_what_was_used_since_the_watch_began(monkeypatch):
    peaks = [300 * MB]  # of what ran before
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(10 * MB))
    device = torch.device("cuda:0")
    watch = Watch(device)
    peaks.append(120 * MB)
    watch.look(5)
    assert watch.highest_mb == 120
    assert peak_memory_mb(device) == 300
