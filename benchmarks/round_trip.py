"""Round trip of timm and torchvision models: train with stochastic depth, fold, load into a fresh model.

Each model trains on a few thousand images of CIFAR-10 with linear decay to 0.5. Then `fold_`, `load_state_dict` with
`strict=True` into a new model of the same library, and both run on test images. The training is short, because the test
is about the round trip, not the accuracy.

python benchmarks/round_trip.py --data-root FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from models import timm_model, torchvision_model
from protocol import write_table
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth_lab.data import Augmentation, Normalization, batches, load

MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": lambda: torchvision_model("resnet18", num_classes=10),
    "torchvision mobilenet_v2": lambda: torchvision_model("mobilenet_v2", num_classes=10),
    "timm resnet26": lambda: timm_model("resnet26", num_classes=10),
    "timm vit_tiny_patch16_224, patches of 4": lambda: timm_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4, depth=6
    ),
    "timm convnext_atto, stem of 2": lambda: timm_model("convnext_atto", num_classes=10, patch_size=2),
    "timm seresnet50": lambda: timm_model("seresnet50", num_classes=10, layers=(1, 2, 1, 1)),
}


def way_back(
    make: Callable[[], nn.Module], train: list[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor]
) -> list[str]:
    """Errors in percent, with the gates and fresh; the largest difference relative to the largest output; answers."""
    model = make()
    sd.make_stochastic_(model, sd.linear_decay(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for inputs, labels in train:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    inputs, labels = test
    with torch.no_grad():
        before = model.eval()(inputs)
        sd.fold_(model)
        fresh = make().eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        after = fresh(inputs)
    errors = [f"{100 * (each.argmax(1) != labels).double().mean():.2f}" for each in (before, after)]
    difference = (before - after).abs().max() / before.abs().max()
    return [*errors, f"{difference:.1e}", str(int((before.argmax(1) != after.argmax(1)).sum()))]


def main() -> None:
    """Train all models and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-test", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("cifar10", data_root=options.data_root)
    normalization = Normalization.fit(data.train.images, "channel")
    few = data.train.first(options.num_train)
    train = list(
        batches(
            few, 64, normalization=normalization, augmentation=Augmentation(translation=4, flip=True), seed=0, epoch=1
        )
    )
    test = data.test.first(options.num_test)
    rows: list[list[str]] = []
    for name, make in MODELS.items():
        rows.append([name, *way_back(make, train, (normalization(test.images), test.labels))])
        print(rows[-1], flush=True)
    write_table(
        "round_trip",
        "Trained with stochastic depth, folded, and loaded into a fresh model",
        ["model", "test error, % (short training)", "fresh model", "largest difference", "answers that differ"],
        rows,
        f"Trained on {options.num_train} images of CIFAR-10 once, batch 64, AdamW at 1e-3; {options.num_test} test "
        "images, fp32; differences relative to the largest output; `load_state_dict(strict=True)`.",
    )


if __name__ == "__main__":
    main()
