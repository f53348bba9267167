"""What the server counts, for Prometheus. One registry per application, so that two in a process do not meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram

if TYPE_CHECKING:
    from .jobs import Job

_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


class RunMeters:
    """Counts runs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter("tmd_jobs_ended", "Jobs that ended", ["model", "outcome"], registry=registry)
        self._stages = Histogram(
            "tmd_stage_seconds", "Seconds per stage of a run", ["model", "stage"], buckets=_SECONDS, registry=registry
        )
        self._waited = Histogram(
            "tmd_queue_seconds", "Seconds that jobs waited", ["model"], buckets=_SECONDS, registry=registry
        )

    def completed(self, job: Job, result: dict[str, Any]) -> None:
        self._ended.labels(job.model, "completed").inc()
        if job.started_at is not None:
            self._waited.labels(job.model).observe(max(job.started_at - job.created_at, 0.0))
        for stage, seconds in result["stage_seconds"].items():
            self._stages.labels(job.model, stage).observe(seconds)

    def failed(self, job: Job, code: str) -> None:
        self._ended.labels(job.model, "cancelled" if code == "cancelled" else "failed").inc()


class RequestMeters:
    """Counts requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter("tmd_requests", "Answered requests", ["method", "route", "status"], registry=registry)
        self._seconds = Histogram(
            "tmd_request_seconds", "Seconds until an answer was complete", ["route"], registry=registry
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
