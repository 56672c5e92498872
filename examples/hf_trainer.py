"""Hugging Face Trainer: python examples/hf_trainer.py --out runs/trainer.

Run it again with more epochs: it resumes from its last checkpoint, with the same gates, bit for bit.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import stochastic_depth as sd


class SaveGates(TrainerCallback):
    """Puts the gates into Trainer's checkpoints, and takes them out again."""

    def __init__(self, depth: sd.Controller) -> None:
        self.depth = depth

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "gates.json")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._path(args, state).write_text(json.dumps(self.depth.state_dict()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.depth.load_state_dict(json.loads(self._path(args, state).read_text()))


def train(out: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Train to that many epochs and return the weights."""
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2]}
    model = ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=10, drop_path_rate=0.5))
    depth = sd.make_stochastic_(model)  # the model's own rates; dropped branches are skipped
    digits = load_digits()
    images = torch.tensor(digits.images[:256], dtype=torch.float32)[:, None] / 16
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, digits.target, strict=False)]
    arguments = TrainingArguments(
        str(out), num_train_epochs=epochs, per_device_train_batch_size=32, save_strategy="epoch", use_cpu=True, seed=0,
        report_to="none", disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SaveGates(depth)])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    return model.state_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    train(**vars(parser.parse_args()))
