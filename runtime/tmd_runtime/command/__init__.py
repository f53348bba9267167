"""`tmd-run`: options, the work for each prompt, progress."""
