#!/usr/bin/env python
"""Continue-tune a model: the command moh-tune, run from a checkout of the repository."""

import sys

from moh_megatron.commands.continue_tune import run

if __name__ == "__main__":
    sys.exit(run())
