"""The command, also as a module: `torchrun --nproc-per-node 2 -m stochastic_depth_lab train ...`."""

import sys

from stochastic_depth_lab.interrupts import ending_at_once


def main() -> int:
    """Run the command; from the first import on, Ctrl-C leaves no traceback."""
    with ending_at_once():
        from stochastic_depth_lab import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
