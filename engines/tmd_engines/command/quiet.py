"""The first import of every program: from here on a Ctrl-C ends the process without a traceback.

It loads nothing. `program.run_program` puts the program's own handling in place, once that can be loaded.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps; it takes no time to import

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
