"""Checkpoints: written atomically, with the previous one kept and damage detected."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stochastic_depth_lab import files
from stochastic_depth_lab.errors import CheckpointError
from stochastic_depth_lab.experiments import find
from stochastic_depth_lab.experiments.config import as_json
from stochastic_depth_lab.runs import checkpoint
from stochastic_depth_lab.runs.checkpoint import load, save

EXPERIMENT = as_json(replace(find("digits-constant"), name="x"))


def state(number: int) -> dict[str, object]:
    return {"number": number, "model": {"weight": torch.full((1000,), float(number))}}


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def die_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """The process dies at its `call`-th contact with the disk."""
    calls = iter(range(1, 100))

    def dying(function):
        def called(*arguments, **options):
            if next(calls) == call:
                raise error
            return function(*arguments, **options)

        return called

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(files, "flush_folder", dying(files.flush_folder))


def loaded(folder: Path) -> int:
    content, _ = load(folder, EXPERIMENT)
    assert content is not None
    assert torch.equal(content["model"]["weight"], torch.full((1000,), float(content["number"])))
    return content["number"]


def test_the_newest_is_loaded_and_the_one_before_kept(tmp_path):
    assert load(tmp_path, EXPERIMENT) == (None, [])
    for number in (1, 2, 3):
        save(tmp_path, state(number), EXPERIMENT)
    assert loaded(tmp_path) == 3
    assert checkpoint.read(tmp_path / "previous.pt")["number"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("call", range(1, 8))
def test_killed_at_any_contact_with_the_disk(tmp_path, monkeypatch, call):
    save(tmp_path, state(1), EXPERIMENT)
    save(tmp_path, state(2), EXPERIMENT)
    with monkeypatch.context() as patch:
        die_at(patch, call, Killed())
        try:
            save(tmp_path, state(3), EXPERIMENT)
            outlived = True
        except Killed:
            outlived = False
    assert loaded(tmp_path) == 3 if outlived else loaded(tmp_path) in (2, 3)
    save(tmp_path, state(4), EXPERIMENT)
    assert loaded(tmp_path) == 4


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_keeps_the_old_one_and_leaves_no_rubbish(tmp_path, monkeypatch, call):
    save(tmp_path, state(1), EXPERIMENT)
    with monkeypatch.context() as patch:
        die_at(patch, call, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, state(2), EXPERIMENT)
    assert loaded(tmp_path) in (1, 2)
    assert not list(tmp_path.glob("*.tmp"))


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def altered(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(content: bytes) -> bytes:
    return content[:0]


@pytest.mark.parametrize("damage", [truncated, altered, emptied])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path, damage):
    save(tmp_path, state(1), EXPERIMENT)
    save(tmp_path, state(2), EXPERIMENT)
    (tmp_path / "last.pt").write_bytes(damage((tmp_path / "last.pt").read_bytes()))
    content, remarks = load(tmp_path, EXPERIMENT)
    assert content is not None
    assert content["number"] == 1
    assert len(remarks) == 1
    assert "last.pt is damaged" in remarks[0]
    (tmp_path / "previous.pt").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        load(tmp_path, EXPERIMENT)


def test_another_configuration_is_refused_and_its_fields_named(tmp_path):
    save(tmp_path, state(1), EXPERIMENT)
    asked = {**EXPERIMENT, "name": "y", "recipe": {**EXPERIMENT["recipe"], "epochs": 7}}
    with pytest.raises(CheckpointError, match=r"configuration: recipe.epochs: 15, not 7 \(there, not here\)"):
        load(tmp_path, asked)


def test_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 99)
        save(tmp_path, state(1), EXPERIMENT)
    with pytest.raises(CheckpointError, match="format 99"):
        load(tmp_path, EXPERIMENT)


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_no_code_of_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Harmful()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError):
        load(tmp_path, EXPERIMENT)
    assert not (tmp_path / "harmed").exists()


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path):
    for number in (1, 2):
        save(tmp_path, state(number), EXPERIMENT)
    (tmp_path / "last.pt").write_bytes(b"")
    _, remarks = load(tmp_path, EXPERIMENT, set_aside=True)
    assert "last.pt is damaged" in remarks[0]
    save(tmp_path, state(3), EXPERIMENT)
    (tmp_path / "last.pt").write_bytes(b"")
    assert loaded(tmp_path) == 1


def test_a_state_that_does_not_match_its_digest_is_damaged(tmp_path):
    for number in (1, 2):
        save(tmp_path, state(number), EXPERIMENT)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    content["model"]["weight"][7] += 1e-3
    torch.save(content, tmp_path / "last.pt")  # a complete archive with its own checksums
    content, remarks = load(tmp_path, EXPERIMENT)
    assert content["number"] == 1
    assert "does not match its digest" in remarks[0]


def test_the_best_weights_are_safetensors_too_with_their_configuration(tmp_path):
    from safetensors import safe_open

    weights = {"a": torch.randn(3, 2).t(), "num_batches_tracked": torch.tensor(4)}
    checkpoint.save_weights(tmp_path, weights, EXPERIMENT)
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert file.metadata()["format_version"] == str(checkpoint.FORMAT_VERSION)
        assert json.loads(file.metadata()["experiment"]) == EXPERIMENT
        assert set(file.keys()) == set(weights)
        assert all(torch.equal(file.get_tensor(name), weight) for name, weight in weights.items())
    assert all(torch.equal(weights[n], w) for n, w in checkpoint.read(tmp_path / "best.pt").items())
