"""Plain PyTorch: torchrun --nproc-per-node 2 --max-restarts 3 examples/plain_torchrun.py --out runs/plain.

Run it again with more epochs, or kill a process: it resumes from its last epoch, with the same gates, bit for bit.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import stochastic_depth as sd


def train(out: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Train to that many epochs and return the weights."""
    torch.manual_seed(0)
    net = sd.models.cifar_resnet(num_layers=14, num_classes=10, in_channels=1)
    depth = sd.make_stochastic_(net, sd.linear_decay(0.5), seed=0)  # the same gates on every rank
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images[:256]).float()[:, None] / 16, torch.tensor(digits.target[:256]))
    sampler = DistributedSampler(data, seed=0)
    first = 0
    if (out / "last.pt").exists():
        state = torch.load(out / "last.pt", weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        depth.load_state_dict(state["depth"])  # the one line that stochastic depth adds to a checkpoint
        first = state["epoch"]
    for epoch in range(first, epochs):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(data, batch_size=32, sampler=sampler):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            states = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "depth": depth.state_dict()}
            torch.save({**states, "epoch": epoch + 1}, out / "next.pt")
            (out / "next.pt").replace(out / "last.pt")
    return net.state_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    # torchrun keeps its store over restarts: a new attempt must not find the addresses of the previous one.
    store, rank, size = next(iter(dist.rendezvous("env://")))
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    train(**vars(parser.parse_args()))
    dist.destroy_process_group()
