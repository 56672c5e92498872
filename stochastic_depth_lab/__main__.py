"""The command line as a module: `torchrun --nproc-per-node 2 -m stochastic_depth_lab train ...`."""

import sys

from stochastic_depth_lab.cli import main

sys.exit(main())
