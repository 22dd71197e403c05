"""The table of a multirun: what was measured, before and after, and nothing that no run has."""

import json

import pytest

from luthier.runs import write_status
from luthier_plugins.commands.compare.table import after_multirun


def summary(folder, name, **values):
    write_status(folder / name, [], "done")
    (folder / name / "summary.json").write_text(
        json.dumps({"last_loss": 0.5, "tokens_per_second": 1234.5, **values})
    )
    return name, folder / name


@pytest.fixture
def shown(capsys):
    def read(runs):
        after_multirun(runs)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
        return [line.split() for line in lines]

    return read


def test_before_and_after_stand_side_by_side(tmp_path, shown):
    pairs = [(0.1, 0.5, 20.0), (0.25, 0.75, 31.26)]
    told = [
        {"loss": 0.7, "accuracy": right, "metrics": {"pair_accuracy": share, "length/preferred": length}}
        for right, share, length in pairs
    ]
    labels = [{"loss": 0.6, "accuracy": None, "metrics": {"label_accuracy": share}} for share in (0.5, 0.875)]
    runs = [
        summary(tmp_path, "0", before=told[0], after=told[1]),
        summary(tmp_path, "1", before=labels[0], after=labels[1]),
    ]
    table = shown(runs)
    assert "2 runs" in " ".join(table[0])
    assert " ".join(table[1]) == "run loss held-out loss preferences length preferred right tok/s"
    first, second = " ".join(table[3]), " ".join(table[4])
    assert first == "0 0 0.5000 0.7000 50% → 75% 20.0 → 31.3 10% → 25% 1,234"
    assert second == "1 1 0.5000 0.6000 50% → 88% – – 1,234"


def test_a_run_that_failed_keeps_its_row(tmp_path, shown):
    write_status(tmp_path / "1", [], "running")
    (tmp_path / "1" / "summary.json").write_text("half a fi")
    table = shown([summary(tmp_path, "0"), ("1", tmp_path / "1")])
    assert " ".join(table[1]) == "run loss tok/s"
    assert " ".join(table[4]) == "1 1 failed"
    assert " ".join(table[5]) == "1 failed: it did not end; was it killed?"


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a14_figures_of_another_run_are_not_shown(tmp_path, shown, state):
    # faults.md A14, hydra#1407: the folder holds an earlier run's summary.
    summary(tmp_path, "1", last_loss=0.125)
    write_status(tmp_path / "1", ["lr=1"], state, "no \x5b/red] rows")
    table = shown([summary(tmp_path, "0"), ("lr=1", tmp_path / "1")])
    assert " ".join(table[4]) == "1 lr=1 failed"
    assert " ".join(table[5]) == "1 failed: no [/red] rows"
    assert "0.1250" not in str(table)
