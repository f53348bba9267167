"""`python -m tmd_runtime` is `tmd-run`."""

from .command.cli import main

main()
