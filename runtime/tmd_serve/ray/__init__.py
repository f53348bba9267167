"""The server on Ray Serve: the same application as ingress, and text encoder, denoiser and decoder as deployments with
replicas and GPUs of their own, which pass embeddings and latents through Ray's object store.

    serve run tmd_serve.ray:build data=/shared/tmd database=postgresql+psycopg://tmd@db/tmd bundles=wan=/models/wan

Not here: the routes, the store and what a stage computes, which are those of `tmd-serve`. Needs the extra `ray`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .application import build

__all__ = ["build"]


def __getattr__(name: str) -> object:
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .application import build

    return build
