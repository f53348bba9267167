"""`python -m tmd_runtime` is `tmd-run`."""

from .cli import main

main()
