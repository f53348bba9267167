"""`python -m tmd_engines` is `tmd-engine`."""

from .command.start import main

main()
