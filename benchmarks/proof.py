"""Cost of the proof at first use: process time of the first training steps, and how often a block's code runs.

Each model is made stochastic with all gates open, so that every step runs the same. The first step records and proves
each kind of block in training; an ordinary step is the median of the later ones. The same model without stochastic
depth is measured too: its first step also warms up PyTorch, which is not a cost of the proof.

    python benchmarks/proof.py [--rounds 20] [--threads 1] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision_schemas  # noqa: F401
from protocol import write_table
from torch import Tensor, nn

import stochastic_depth as sd


def timm_model(name: str, **options: Any) -> Callable[[], tuple[nn.Module, list[Any]]]:
    """A model of timm without its drop paths, and a mini-batch of 8 images."""

    def make() -> tuple[nn.Module, list[Any]]:
        import timm

        return timm.create_model(name, num_classes=10, **options), [torch.randn(8, 3, 224, 224)]

    return make


def llama() -> tuple[nn.Module, list[Any]]:
    """A small language model of transformers, and 4 texts of 128 tokens."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config), [torch.randint(0, 1000, (4, 128))]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "timm vit_small_patch16_224": timm_model("vit_small_patch16_224"),
    "timm resnet50": timm_model("resnet50"),
    "timm convnext_nano": timm_model("convnext_nano"),
    "timm swin_tiny": timm_model("swin_tiny_patch4_window7_224"),
    "transformers Llama, 8 layers": llama,
}


def step_times(net: nn.Module, inputs: list[Any], num_steps: int) -> list[float]:
    """Process times of training steps, in seconds."""
    times: list[float] = []
    for _ in range(num_steps):
        begin = time.process_time()
        net.zero_grad()
        output = net(*inputs)
        output = output if isinstance(output, Tensor) else output[0]
        output.square().mean().backward()
        times.append(time.process_time() - begin)
    return times


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(MODELS))
    parser.add_argument("--name", default="proof", help="name of the table's file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[list[str]] = []
    for name in args.only:
        torch.manual_seed(0)
        plain, inputs = MODELS[name]()
        net = copy.deepcopy(plain)
        step_times(plain, inputs, 1)
        begin = time.process_time()
        depth = sd.make_stochastic_(net, sd.uniform(1.0), granularity="batch")
        making = time.process_time() - begin
        first, second = step_times(net, inputs, 2)
        # In turns, so that other load on the machine affects both.
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(args.rounds):
            ours += step_times(net, inputs, 1)
            theirs += step_times(plain, inputs, 1)
        ordinary = statistics.median(ours)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        known = next(own.forms for module in net.modules() if (own := vars(module).get("_stochastic_depth_branch")))
        rows.append([
            name, str(len(depth.names)), f"{making:.2f} s", f"{first / ordinary:.2f}", f"{second / ordinary:.2f}",
            str(known.num_runs), f"{1000 * (first - ordinary):.0f} ms", f"{ratio:.3f}",
        ])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    header = [
        "model", "branches", "make_stochastic_", "first step", "second step", "runs of a block", "the proof",
        "step, all open / plain",
    ]  # fmt: skip
    write_table(
        args.name,
        "What the proof at first use costs",
        header,
        rows,
        "Process time of training steps of 8 images of 224 x 224 pixels, or 4 texts of 128 tokens; first and second "
        "step are relative to the median of the others.",
    )


if __name__ == "__main__":
    main()
