#!/usr/bin/env python
"""Make a dataset: the command moh-prepare, run from a checkout of the repository."""

import sys

from moh_megatron.commands.prepare_data import run

if __name__ == "__main__":
    sys.exit(run())
