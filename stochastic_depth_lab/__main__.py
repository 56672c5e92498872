"""The command, also as a module: `torchrun --nproc-per-node 2 -m stochastic_depth_lab train ...`."""

import sys

from stochastic_depth_lab.interrupts import EndingAtOnce


def main() -> int:
    """Run the command; from the first import on, Ctrl-C leaves no traceback."""
    with EndingAtOnce():
        from stochastic_depth_lab import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
