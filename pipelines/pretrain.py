#!/usr/bin/env python
"""Pretrain a language model: the command moh-pretrain, run from a checkout of the repository."""

import sys

from moh_megatron.commands.pretrain import run

if __name__ == "__main__":
    sys.exit(run())
