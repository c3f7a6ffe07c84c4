#!/usr/bin/env python
"""Evaluate a model: the command moh-evaluate, run from a checkout of the repository."""

import sys

from moh_megatron.commands.evaluate import run

if __name__ == "__main__":
    sys.exit(run())
