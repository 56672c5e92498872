"""Is a branch faster on the surviving samples than on all samples with a mask? By branch and dropped share.

    python benchmarks/subset_or_mask.py [--batch-sizes 8 64]

One forward and backward of a gated sum, process time, as a ratio to the plain sum of the same branch.
"""

from __future__ import annotations

import torchvision_schemas  # noqa: F401

# isort: split
import argparse
import functools
from collections.abc import Callable

import timm
import torch
from protocol import interleaved, ratio, write_table
from torch import Tensor, nn

import stochastic_depth as sd


def branches() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Branches, from a few operations per value to many, each with the shape of one sample."""
    block = timm.create_model("vit_tiny_patch16_224", depth=1).blocks[0]
    convnext = timm.create_model("convnext_atto").stages[0].blocks[0]
    return {
        "depthwise convolution": (nn.Conv2d(64, 64, 3, padding=1, groups=64), (64, 16, 16)),
        "one linear map, 192": (nn.Linear(192, 192), (65, 192)),
        "ConvNeXt-Atto": (nn.Sequential(convnext.conv_dw, convnext.norm, convnext.mlp), (40, 28, 28)),
        "ViT-Tiny attention": (nn.Sequential(block.norm1, block.attn), (65, 192)),
        "ViT-Tiny MLP": (nn.Sequential(block.norm2, block.mlp), (65, 192)),
    }


def masked_sum(branch: nn.Module, survivors: Tensor, x: Tensor) -> Tensor:
    """All samples computed, then multiplied by their gates."""
    return x + branch(x) * survivors.view(-1, *[1] * (x.dim() - 1))


def run(network: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Forward and backward, the gradient of the input too."""
    network(x.clone().requires_grad_()).sum().backward()


def gated(network: nn.Module, depth: sd.Controller, gate: Tensor, x: Tensor) -> None:
    """Forward and backward with these samples open."""
    with depth.gates([gate]):
        run(network, x)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (branch, shape) in branches().items():
        for num_samples in args.batch_sizes:
            x = torch.randn(num_samples, *shape)
            plain = sd.Residual(branch)
            steps = {"plain": functools.partial(run, plain, x)}
            stochastic = nn.Sequential(sd.Residual(branch))
            depth = sd.make_stochastic_(stochastic, [0.5], granularity="sample", rescale="none")
            for dropped in (1, num_samples // 4, num_samples // 2):
                gate = torch.ones(num_samples, dtype=torch.bool)
                gate[torch.randperm(num_samples)[:dropped]] = False
                steps[f"mask {dropped}"] = functools.partial(
                    run, functools.partial(masked_sum, branch, gate.float()), x
                )
                steps[f"subset {dropped}"] = functools.partial(gated, stochastic, depth, gate, x)
            times = interleaved(steps, rounds=args.rounds, warm_up=2)
            cells = [f"{ratio(times[step], times['plain'])[0]:.2f}" for step in steps if step != "plain"]
            rows.append([name, str(num_samples), *cells])
    write_table(
        "subset_or_mask",
        "A gated sum, its branch masked or run on the survivors: process time over that of the plain sum",
        [
            "branch",
            "batch",
            *(f"{share}: {how}" for share in ("one dropped", "1/4", "1/2") for how in ("mask", "subset")),
        ],
        rows,
        f"Median ratio of n = {args.rounds} interleaved rounds, forward and backward, fp32.",
    )


if __name__ == "__main__":
    main()
