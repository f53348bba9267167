"""What can go wrong for a reason outside this program, as one message and an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tmd_engines.command.program import BAD_USAGE, FAILED, INTERRUPTED

from ..errors import RuntimeFailure, UsageFailure

LEAST_ADDRESS_SPACE = 900_000_000 + 50_000_000 * (os.cpu_count() or 1)  # threads have address space of their own
"""Bytes. Below, the built-in model failed at 100 to 1,000 MB in nine ways, with a segmentation fault among them."""


def check_address_space() -> None:
    """Raises RuntimeFailure if `ulimit -v` leaves less than the libraries take: some of them crash then."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):  # not Unix
        return
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise RuntimeFailure(
            f"the address space of this process is limited to {limit / 1e6:.0f} MB (ulimit -v), and a run takes at "
            f"least {LEAST_ADDRESS_SPACE / 1e6:.0f} MB of it, most of which is never used: raise that limit, or limit "
            "the memory itself (a container's limit)."
        )


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
