"""`python -m tmd_runtime` is `tmd-run`."""

from .command.start import main

main()
