"""`python -m tmd_bench` is `tmd-bench`."""

from .start import main

main()
