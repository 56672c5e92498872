"""Lightning: python examples/lightning_module.py --out runs/lightning.

Run it again with more epochs: it resumes from its last checkpoint, with the same gates, bit for bit.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import stochastic_depth as sd


class Digits(lightning.LightningModule):
    """A network with stochastic depth, whose gates go into Lightning's checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.net = sd.models.cifar_resnet(num_layers=14, num_classes=10, in_channels=1)
        self.depth = sd.make_stochastic_(self.net, sd.linear_decay(0.5), seed=0)

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["depth"] = self.depth.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.depth.load_state_dict(checkpoint["depth"])


def train(out: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Train to that many epochs and return the weights."""
    lightning.seed_everything(0, verbose=False)
    module = Digits()
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images[:256]).float()[:, None] / 16, torch.tensor(digits.target[:256]))
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    saver = ModelCheckpoint(dirpath=out, save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[saver], **quiet)
    trainer.fit(module, loader, ckpt_path=out / "last.ckpt" if (out / "last.ckpt").exists() else None)
    return module.net.state_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    train(**vars(parser.parse_args()))
