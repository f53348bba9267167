"""`python -m tmd_export` is `tmd-export`."""

from .start import main

main()
