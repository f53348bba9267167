"""The deployments, and how they are put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import ray
from prometheus_client import CollectorRegistry
from ray import serve

from tmd_engines.bundle.manifest import MANIFEST_NAME
from tmd_runtime import UsageFailure
from tmd_runtime.built_in import locate

from ..board import Board
from ..command.serve import open_database, recover
from ..files import DataFolder
from ..http.app import create_app
from ..local.model import EngineOptions, open_models
from ..local.worker import Pace, Worker
from ..meters import RunMeters
from ..settings import ServeSettings
from ..store.sql_jobs import SqlJobs
from ..store.sql_keys import SqlKeys
from ..workers import Workers
from .arguments import Arguments, Replicas
from .messages import Made, Message
from .objects import Objects
from .runner import Handles, RayRunner
from .stages import DecodeStage, DenoiseStage, TextStage
from .threads import StageThread

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from ..jobs import Job
    from ..local.model import Model

_GRACE_SECONDS = 25.0  # before Ray's own patience with a replica that shall end


def _models(arguments: Arguments, runs_here: bool) -> dict[str, Model]:
    options = EngineOptions(arguments.engine, arguments.device, arguments.threads, arguments.memory)
    return open_models(arguments.bundles, options, arguments.limits, runs_here)


class TextEncoder:
    """Prompts -> embeddings."""

    def __init__(self, arguments: Arguments) -> None:
        self._stage = TextStage(_models(arguments, True), DataFolder(arguments.data), arguments.max_loaded)
        self._thread, self._objects = StageThread(), Objects()

    async def run(self, job: Job) -> AsyncIterator[Message]:
        async for message in self._thread.stream(lambda send: self._stage.run(job, send, self._objects.put)):
            yield message


class Denoiser:
    """Embeddings -> latents: the loop."""

    def __init__(self, arguments: Arguments) -> None:
        self._stage = DenoiseStage(_models(arguments, True), DataFolder(arguments.data), arguments.max_loaded)
        self._thread, self._objects = StageThread(), Objects()

    async def run(self, job: Job, box: tuple[Any, ...]) -> AsyncIterator[Message]:
        def work(send: Any) -> Made:
            return self._stage.run(job, ray.get(box[0]) if box else None, send, self._objects.put)

        async for message in self._thread.stream(work):
            yield message


class Decoder:
    """Latents -> the files of a job."""

    def __init__(self, arguments: Arguments) -> None:
        self._stage = DecodeStage(_models(arguments, True), DataFolder(arguments.data), arguments.max_loaded)
        self._thread = StageThread()

    async def run(self, job: Job, box: tuple[Any, ...], denoised: Made) -> AsyncIterator[Message]:
        async for message in self._thread.stream(lambda send: self._stage.run(job, ray.get(box[0]), denoised, send)):
            yield message


@serve.ingress()
class Ingress:
    """The HTTP application, with workers that lead jobs through the stages."""

    def __init__(self, arguments: Arguments, text_encoder: Any, denoiser: Any, decoder: Any) -> None:
        self._arguments, self._handles = arguments, Handles(text_encoder, denoiser, decoder)
        self._database = open_database(arguments.data, arguments.database)
        self._executor: Workers | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        arguments = self._arguments
        store = SqlJobs(self._database, arguments.attempts, arguments.keep_days * 86400)
        files = DataFolder(arguments.data)
        models, board, registry = _models(arguments, False), Board(), CollectorRegistry()
        pace, meters = Pace(most=arguments.max_seconds), RunMeters(registry)
        workers = [
            Worker(store, files, RayRunner(models, self._handles), board, arguments.keep_bytes, pace, meters)
            for _ in range(arguments.slots)
        ]
        self._executor = Workers(models, workers, board)
        hosts = None if arguments.require_key else ServeSettings.hosts
        settings = ServeSettings(arguments.data, arguments.limits, arguments.require_key, hosts)
        recover(store, files, alone=False)
        app = create_app(store, self._executor, settings, SqlKeys(self._database), registry)
        self._executor.start()
        return app

    def __del__(self) -> None:
        # Ray ends a replica so; a killed one leaves its leases to run out.
        if self._executor is not None:
            self._executor.board.close()
            self._executor.stop(_GRACE_SECONDS)


def build(arguments: Arguments | Mapping[str, Any]) -> Application:
    """The application for `serve run`, `serve deploy` and `ray.serve.run`. The first two give it a dictionary.

    Raises UsageFailure for wrong arguments, for a folder that is not a bundle, and for several ingresses on a SQLite
    file, which only one may use.
    """
    if not isinstance(arguments, Arguments):
        arguments = Arguments.read(arguments)
    if arguments.database is None and arguments.ingress.limit > 1:
        raise UsageFailure("several ingresses need one PostgreSQL: name it (database=postgresql+psycopg://...).")
    for name, bundle in arguments.bundles.items():
        if not (locate(bundle) / MANIFEST_NAME).is_file():
            raise UsageFailure(
                f"the bundle of {name} is not here ({bundle}): every machine must have it at this place."
            )
    stages: list[DeploymentHandle[Any]] = [
        _deployed(part, replicas, 1).bind(arguments)
        for part, replicas in (
            (TextEncoder, arguments.text_encoders),
            (Denoiser, arguments.denoisers),
            (Decoder, arguments.decoders),
        )
    ]
    return _deployed(Ingress, arguments.ingress, 1000).bind(arguments, *stages)


def _deployed(part: type, replicas: Replicas, at_once: int) -> Any:
    """A deployment that takes `at_once` requests per replica, and grows while more of them wait."""
    return serve.deployment(
        part,
        name=part.__name__,
        max_ongoing_requests=at_once,
        graceful_shutdown_timeout_s=_GRACE_SECONDS + 5,
        autoscaling_config={
            "min_replicas": replicas.least,
            "max_replicas": replicas.limit,
            "target_ongoing_requests": at_once,
        },
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
    )
