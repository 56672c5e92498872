"""No file makes a reader run code, hang, fill the memory or write elsewhere; the short form of the fuzzer."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stochastic_depth_lab.data import cifar
from stochastic_depth_lab.errors import CheckpointError
from stochastic_depth_lab.experiments import config, find
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.runs import checkpoint

NUM_INPUTS = 10_000


def test_ten_thousand_broken_files_are_read_or_refused_by_the_readers_own_errors() -> None:
    command = [sys.executable, hostile.__file__, "--inputs", str(NUM_INPUTS), "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *counts, last = done.stdout.splitlines()
    assert last.split()[0] == str(NUM_INPUTS)
    # Every reader has read some inputs and refused some, so the damage is neither too small nor too large.
    for reader in hostile.targets():
        assert {line.rpartition(": ")[2] for line in counts if f"  {reader}: " in line} == {"read", "refused"}


class Calls:
    """The content of a malicious pickle: it calls a function when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_calls_the_system_calls_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "called"
    pickle.loads(pickle.dumps(Calls(marker)))
    assert marker.exists()  # it would
    marker.unlink()
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system, which could run foreign code"):
        cifar.read_batch(pickle.dumps({"data": Calls(marker), "labels": []}), "labels")
    torch.save({"format_version": checkpoint.FORMAT_VERSION, "model": Calls(marker)}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact: .* is damaged"):
        checkpoint.load(tmp_path, hostile.EXPERIMENT)
    assert not marker.exists()


def test_a_checkpoint_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\x00" * 50_000_000)
    assert (tmp_path / "last.pt").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed, which PyTorch never does"):
        checkpoint.read(tmp_path / "last.pt")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = st.sampled_from([name for name in hostile.EXPERIMENT if name != "name"])


@given(st.lists(st.tuples(_FIELDS, _JSON), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_in_a_configuration_is_taken_or_refused(changes: list[tuple[str, Any]]) -> None:
    with contextlib.suppress(ValueError):  # and nothing else
        experiment = config.from_json({**hostile.EXPERIMENT, **dict(changes)})
        check(experiment)
        assert config.from_json(config.as_json(experiment)) == experiment


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/b", "..", ".", "", "a\x00b", "a\\b"])
def test_a_name_that_leads_out_of_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name of a run must be a plain file name"):
        check(replace(find("digits-constant"), name=name))
