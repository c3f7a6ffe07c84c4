#!/usr/bin/env python
"""Plans a run: the command moh-plan, run from a checkout of the repository."""

import sys

from moh_megatron.commands.plan import run

if __name__ == "__main__":
    sys.exit(run())
