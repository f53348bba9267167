"""What engines share: buffers, plan cache, CPU and GPU. No engine is in here."""
