"""`python -m tmd_export` is `tmd-export`."""

from .cli import main

main()
