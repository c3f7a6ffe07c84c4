#!/usr/bin/env python
"""Continue prompts with a model: the command moh-generate, run from a checkout of the repository."""

import sys

from moh_megatron.commands.generate import run

if __name__ == "__main__":
    sys.exit(run())
