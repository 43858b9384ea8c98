"""`unime-ray serve RUN`: start the graph on this machine (or the cluster of RAY_ADDRESS) and say where it answers."""

from __future__ import annotations

import logging
import os
import time

from unime_ray.artifacts import Run
from unime_ray.config import RunConfig
from unime_ray.config_serve import ServeConfig
from unime_ray.errors import ConfigError
from unime_ray.serve.bundle import Bundle, resolve_bundle
from unime_ray.serve.gate import LOOPBACK, key_digests

APP = "unime-ray"
REQUEST_SECONDS_SPARE = 10
log = logging.getLogger("unime_ray")


def serve_run(
    run: Run,
    config: RunConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    blocking: bool = True,
    settings: ServeConfig | None = None,
) -> Bundle:
    """Serve the run's embedder, reranker and items; returns (or, `blocking`, waits for an interrupt) once it answers.

    `settings` stands in for the config's section `serve`. Needs a Ray cluster (`cluster.connected`), which must stay
    connected for as long as it serves.

    Raises:
        ConfigError, ArtifactError, ModelError: see `resolve_bundle`.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from unime_ray.serve.deployments import application

    settings = settings or config.serve
    bundle = resolve_bundle(run, config, settings)
    digests = key_digests(os.environ.get(settings.api_key_env, ""))
    open_to_all = host not in LOOPBACK
    if open_to_all and not digests:
        log.warning("serving on %s with no API key: whoever reaches it may write; set %s", host, settings.api_key_env)
    options = HTTPOptions(host=host, port=port, request_timeout_s=request_seconds(settings))
    quiet = LoggingConfig(enable_access_log=False)  # the gate writes a line a request; Serve's own, one a hop, cost
    serve.start(http_options=options, proxy_location="HeadOnly", logging_config=quiet)
    graph = application(bundle, digests, None if open_to_all else LOOPBACK)
    try:
        serve.run(graph, name=APP, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise ConfigError(f"serving did not start: {' '.join(str(error).split())}") from error
    log.info("serving %s at http://%s:%d", run.root, host, port)
    if blocking:
        _wait()
    return bundle


def request_seconds(settings: ServeConfig) -> float:
    """When Ray's proxy gives up on a request: after the longest deadline that one may have."""
    return settings.limits.max_deadline_ms / 1000 + REQUEST_SECONDS_SPARE


def _wait() -> None:
    from ray import serve

    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        log.info("stopping")
    finally:
        serve.shutdown()
