"""The short form of `make faults`: a few faults of every kind in one or two runs."""

import shlex
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from small_runs import assert_same, outcome


@pytest.mark.slow
def test_a_run_survives_every_fault_and_ends_the_same(tmp_path: Path) -> None:
    survived = faults.interrupt(tmp_path, epochs=3, kills=4, others=len(faults.OTHERS), seed=1)
    assert survived["kill"] + survived["kill in a write"] == 4
    assert all(survived[kind] == 1 for kind in faults.OTHERS)
    assert survived["of these while a checkpoint was being written"] >= 1


@pytest.mark.slow
def test_torchrun_resumes_after_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    survived = faults.interrupt_two(tmp_path, epochs=30, kills=1, seed=0)
    assert survived == {"one of two processes killed": 1, "SIGTERM to torchrun": 1}


MOUNT = ["unshare", "--map-root-user", "--mount", "sh", "-e", "-c"]
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=3m none run
{train} && exit 1 || code=$?
ls run/checkpoints
mount -o remount,size=20m run
{train} --resume
cp -r run kept
exit $code
"""


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_resumes_with_more_space(tmp_path: Path) -> None:
    """A file system of three megabytes, enough for two checkpoints but not for the best weights as well."""
    (tmp_path / "run").mkdir()
    if subprocess.run([*MOUNT, "mount -t tmpfs none run"], cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    arguments = [*faults.EXPERIMENT, "--recipe.epochs", "2"]
    train = shlex.join([sys.executable, "-m", "stochastic_depth_lab", *arguments, "--out", "run"])
    script = [*MOUNT, ON_A_SMALL_DISK.format(train=train)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (refusal,) = [line for line in done.stderr.splitlines() if "No space left" in line]
    assert refusal.endswith("Make room, then resume the run with --resume.")
    assert done.stdout.splitlines()[:2] == ["last.pt", "previous.pt"]  # and no rubbish: the next line is the result
    assert done.stdout.splitlines()[2].startswith("test error")
    assert_same(outcome(tmp_path / "kept"), faults.uninterrupted(tmp_path / "whole", 2))
