"""`python -m tmd_ref.distill`, and so `torchrun -m -- tmd_ref.distill`: the command tmd-distill."""

from tmd_ref.distill.start import main

main()
