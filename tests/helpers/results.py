"""What a run gave."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmd_runtime import Result


def result_latents(result: Result) -> NDArray[np.float32]:
    """The latents of a run that denoised. Comparing `result.latents` itself would also hold of two runs without."""
    assert result.latents is not None
    return result.latents
