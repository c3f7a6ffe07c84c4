#!/usr/bin/env python
"""Convert models from and to Hugging Face folders: the command moh-convert, run from a checkout of the repository."""

import sys

from moh_megatron.commands.convert import run

if __name__ == "__main__":
    sys.exit(run())
