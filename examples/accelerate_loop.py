"""Accelerate: accelerate launch examples/accelerate_loop.py --out runs/accelerate.

Run it again with more epochs: it resumes from its last checkpoint, with the same gates, bit for bit.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd


def train(out: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Train to that many epochs and return the weights."""
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    net = sd.models.cifar_resnet(num_layers=14, num_classes=10, in_channels=1)
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5), seed=0)
    digits = load_digits()
    images = torch.tensor(digits.images[:256], dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target[:256]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    accelerator.register_for_checkpointing(depth)  # the gates are saved and loaded with everything else
    first = 0
    if (out / "epoch").exists():
        first = int((out / "epoch").read_text())
        accelerator.load_state(str(out / f"after-{first}"))
    for epoch in range(first, epochs):
        for inputs, labels in loader:
            accelerator.backward(F.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(str(out / f"after-{epoch + 1}"))
        if accelerator.is_main_process:
            (out / "epoch").write_text(str(epoch + 1))
    return accelerator.unwrap_model(model).state_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    train(**vars(parser.parse_args()))
