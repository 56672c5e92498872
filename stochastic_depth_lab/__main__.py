"""The command as a module: `torchrun --nproc-per-node 2 -m stochastic_depth_lab train ...`."""

import _signal  # pyright: ignore[reportMissingImports] -- built in: unlike `signal`, it imports nothing
import sys


def main() -> int:
    """Run the command; from the first import on, Ctrl-C leaves no traceback."""
    before = _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from stochastic_depth_lab.cli.interrupts import EndingAtOnce

    with EndingAtOnce():
        from stochastic_depth_lab.cli.main import main as run
    _signal.signal(_signal.SIGINT, before)
    return run()


if __name__ == "__main__":
    sys.exit(main())
