"""The short form of `make faults`: a few faults of every kind into one run or two."""

from pathlib import Path

import faults
import pytest


@pytest.mark.slow
def test_whatever_happens_to_it_a_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    survived = faults.interrupt(tmp_path, epochs=3, kills=4, others=len(faults.OTHERS), seed=1)
    assert survived["kill"] + survived["kill in a write"] == 4
    assert all(survived[kind] == 1 for kind in faults.OTHERS)
    assert survived["of these while a checkpoint was being written"] >= 1


@pytest.mark.slow
def test_torchrun_goes_on_after_one_of_two_processes_was_killed(tmp_path: Path) -> None:
    survived = faults.interrupt_two(tmp_path, epochs=30, kills=1, seed=0)
    assert survived == {"one of two processes killed": 1, "SIGTERM to torchrun": 1}
