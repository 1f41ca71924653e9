"""`python -m jaxllm.export`: the command `jaxllm export`."""

import sys

from jaxllm.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
