"""The command, also as a module: `torchrun --nproc-per-node 2 -m stochastic_depth_lab train ...`."""

import sys

from stochastic_depth_lab.cli.interrupts import EndingAtOnce


def main() -> int:
    """Run the command; from the first import on, Ctrl-C leaves no traceback."""
    with EndingAtOnce():
        from stochastic_depth_lab.cli.main import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
