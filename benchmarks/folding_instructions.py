"""Machine instructions of a forward before and after folding, counted by Valgrind.

Unlike times, they are the same on a busy machine. A process under callgrind runs the network of constant depth twice,
the folded one and the stochastic one, and counts each forward separately. It takes minutes.

python benchmarks/folding_instructions.py
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_FORWARDS = 3
NETWORKS = ("constant", "constant again", "folded", "not folded")


def run_counted() -> None:
    """In the process under callgrind: a dump for each network, in the order of `NETWORKS`."""
    import torch

    import stochastic_depth as sd

    torch.set_num_threads(1)
    torch.manual_seed(0)
    constant = sd.models.cifar_resnet(20).eval()
    stochastic = copy.deepcopy(constant)
    sd.make_stochastic_(stochastic, sd.linear_decay(0.5))
    folded = copy.deepcopy(stochastic)
    sd.fold_(folded)
    networks = [constant, copy.deepcopy(constant), folded, stochastic]
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        for network in networks:  # one-time setup
            for _ in range(2):
                network(x)
        for network in networks:
            torch._C._valgrind_toggle()
            for _ in range(NUM_FORWARDS):
                network(x)
            torch._C._valgrind_toggle_and_dump_stats()


def main() -> None:
    """Count, and write the table."""
    from protocol import write_table

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, sys.executable, __file__, "--counted"], check=True, env=environment)
        counts = [
            int(re.findall(r"^(?:totals|summary): (\d+)", (out.parent / f"{out.name}.{n}").read_text(), re.M)[-1])
            for n in range(1, len(NETWORKS) + 1)
        ]
    rows = [
        [name, f"{count / NUM_FORWARDS:,.0f}", f"{count / counts[0]:.4f}"]
        for name, count in zip(NETWORKS, counts, strict=True)
    ]
    write_table(
        "folding_instructions",
        "Instructions of a forward, ResNet-20 for CIFAR, one image, linear decay to 0.5",
        ["network", "instructions", "ratio"],
        rows,
        f"Mean of {NUM_FORWARDS} forwards after two that are not counted, under Valgrind's callgrind.",
    )


if __name__ == "__main__":
    run_counted() if "--counted" in sys.argv else main()
