"""What holds for every test: compiled graphs are kept in a folder of this run, never in the user's own cache."""

from __future__ import annotations

import atexit
import os
import tempfile

_folder = tempfile.TemporaryDirectory(prefix="tmd-test-cache-")
atexit.register(_folder.cleanup)
os.environ["TMD_CACHE"] = _folder.name
