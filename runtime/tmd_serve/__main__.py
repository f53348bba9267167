"""`python -m tmd_serve`."""

from __future__ import annotations

from .start import main

main()
