"""timm's own training utilities: python examples/timm_training.py --out runs/timm.

Run it again with more epochs: it resumes from its last checkpoint, with the same gates, bit for bit.
"""

import argparse
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3

import stochastic_depth as sd


def train(out: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Train to that many epochs and return the weights."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, num_classes=10, depth=4, embed_dim=24,
        num_heads=2, drop_path_rate=0.5,
    )  # fmt: skip
    depth = sd.make_stochastic_(model)  # the model's own rates; dropped branches are skipped
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=100, warmup_t=2)
    averaged = ModelEmaV3(model, decay=0.9)
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:256]).float()[:, None] / 16, torch.tensor(digits.target[:256])
    out.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, model_ema=averaged, checkpoint_dir=str(out), recovery_dir=str(out))
    first = 0
    if (out / "last.pth.tar").exists():
        first = resume_checkpoint(model, str(out / "last.pth.tar"), optimizer, log_info=False) or 0
        resume_checkpoint(averaged.module, str(out / "last.pth.tar"), log_info=False)
        depth.load_state_dict(torch.load(out / f"gates-{first - 1}.pt", weights_only=True))
    loss_of = LabelSmoothingCrossEntropy()
    for epoch in range(first, epochs):
        scheduler.step(epoch)
        for batch in torch.randperm(256, generator=torch.Generator().manual_seed(epoch)).split(32):
            loss_of(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            averaged.update(model)
        torch.save(depth.state_dict(), out / f"gates-{epoch}.pt")  # before the checkpoint that needs it
        saver.save_checkpoint(epoch)
    return model.state_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    train(**vars(parser.parse_args()))
