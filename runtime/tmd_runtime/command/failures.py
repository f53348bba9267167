"""What can go wrong for a reason outside this program, as one message and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import RuntimeFailure, UsageFailure

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130


@contextmanager
def failures(fail: Callable[[str, int], object]) -> Iterator[None]:
    """Everything that can go wrong for a reason outside this program ends in `fail(message, exit code)`."""
    try:
        yield
    except UsageFailure as error:
        fail(str(error), BAD_USAGE)
    except RuntimeFailure as error:
        fail(str(error), FAILED)
    except KeyboardInterrupt:
        fail("stopped.", INTERRUPTED)
    except MemoryError:
        fail("there is not enough memory for this model. Close other programs, or use a smaller model.", FAILED)
    except OSError as error:
        fail(f"{error}.", FAILED)
    except Exception as error:
        from tmd_engines import BundleError, EngineError

        if not isinstance(error, (BundleError, EngineError)):
            raise
        fail(str(error), FAILED)
