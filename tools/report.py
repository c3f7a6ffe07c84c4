#!/usr/bin/env python
"""Write a page about runs: the command moh-report, run from a checkout of the repository."""

import sys

from moh_megatron.commands.report import run

if __name__ == "__main__":
    sys.exit(run())
