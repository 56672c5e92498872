"""Process time of forward and backward of a timm model with its own drop path, and with the same rates and skipping.

The expected shares of FLOPs and time differ if stages differ in time per FLOP. So the script also measures the share of
the time that the branches of each stage take (from steps in which they are closed), and prints the share that perfect
skipping would leave.
"""

from __future__ import annotations

import torchvision_schemas  # noqa: F401

# isort: split
import argparse
import functools
import statistics

import timm
import torch
import torch.nn.functional as F
from protocol import interleaved, ratio, write_table

import stochastic_depth as sd


def step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def stages_of(depth: sd.Controller) -> dict[str, list[int]]:
    """The branches of each stage: `stages.0`, `layer1`, or `blocks`, where all have one shape."""
    stages: dict[str, list[int]] = {}
    for index, name in enumerate(depth.names):
        first, second, *_ = name.split(".")
        stages.setdefault(f"{first}.{second}" if first == "stages" else first, []).append(index)
    return stages


def closed_step(depth: sd.Controller, closed: list[int], step: functools.partial[None]) -> None:
    """A step with these branches closed and all others open."""
    with depth.gates([index not in closed for index in range(len(depth.names))]):
        step()


def share_of_time(depth: sd.Controller, times: dict[str, list[float]]) -> float:
    """Share of the time of rate 0 that perfect skipping would leave."""
    whole = statistics.median(times["rate 0"])
    left = 1.0
    for stage, indices in stages_of(depth).items():
        of_stage = 1 - statistics.median(times[f"{stage} closed"]) / whole
        left -= of_stage * statistics.fmean(1 - depth.survival_probs[index] for index in indices)
    return left


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.5, help="drop path rate of the last block; timm's linear decay")
    parser.add_argument(
        "--uniform", action="store_true", help="the same rate in every block, as DINOv2 and DeiT III have"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the gates, the weights and the images")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def create(rate: float) -> torch.nn.Module:
        torch.manual_seed(args.seed)
        size = {"img_size": args.image_size} if "vit" in args.model else {}
        model = timm.create_model(args.model, drop_path_rate=rate, num_classes=10, **size)
        if args.uniform and rate:
            for block in model.blocks:
                block.drop_path1, block.drop_path2 = timm.layers.DropPath(rate), timm.layers.DropPath(rate)
        return model

    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    labels = torch.randint(10, (args.batch_size,))
    skipping = create(args.rate)
    depth = sd.make_stochastic_(skipping, seed=args.seed)
    shape = "uniform" if args.uniform else "linear"
    models = {
        "rate 0": create(0.0),
        "rate 0 again": create(0.0),
        f"{shape} {args.rate}, timm": create(args.rate),
        f"{shape} {args.rate}, make_stochastic_": skipping,
    }
    steps = {name: functools.partial(step, model, images, labels) for name, model in models.items()}
    for stage, indices in stages_of(depth).items():
        steps[f"{stage} closed"] = functools.partial(closed_step, depth, indices, steps[list(models)[-1]])
    times = interleaved(steps, rounds=args.rounds, warm_up=args.warm_up)
    rows = []
    for name, values in times.items():
        median, mean = ratio(values, times["rate 0"])
        rows.append([name, f"{sorted(values)[len(values) // 2] * 1e3:.0f}", f"{median:.3f}", f"{mean:.3f}"])
    write_table(
        f"drop_path_{args.model}_{shape}_{args.rate}",
        f"Forward and backward, {args.model}, {args.image_size} pixels, batch {args.batch_size}, fp32",
        ["model", "process time, ms (median)", "ratio to rate 0 (median)", "ratio of means"],
        rows,
        f"Expected share of the FLOPs {depth.cost(images).flops_share:.3f}; of the time, with perfect skipping, "
        f"{share_of_time(depth, times):.3f}. n = {args.rounds} interleaved rounds.",
    )


if __name__ == "__main__":
    main()
