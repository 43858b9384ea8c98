"""What a Serve config file imports: `import_path: unime_ray.serve.entry:build`, with the arguments of `GraphArgs`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from unime_ray.artifacts import Run
from unime_ray.config_serve import ServeConfig
from unime_ray.errors import ConfigError
from unime_ray.serve.bundle import resolve_bundle, run_config
from unime_ray.serve.gate import LOOPBACK, key_digests

if TYPE_CHECKING:
    from ray.serve import Application

IMPORT_PATH = "unime_ray.serve.entry:build"


class GraphArgs(BaseModel):
    """`run`: the run folder; `settings`: in place of the config's section `serve`; `open_to_all`: answer for any Host
    header, as needed behind an address other than this machine's own."""

    model_config = ConfigDict(extra="forbid")

    run: str
    settings: ServeConfig = ServeConfig()
    open_to_all: bool = False


def build(args: dict[str, Any]) -> Application:
    """The graph of a run, bound.

    Raises:
        ConfigError, ArtifactError, ModelError: see `resolve_bundle`.
    """
    from unime_ray.serve.deployments import application

    try:
        given = GraphArgs.model_validate(args)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"args.{where}: {error.errors()[0]['msg']}") from error
    run = Run(given.run)
    bundle = resolve_bundle(run, run_config(run), given.settings)
    digests = key_digests(os.environ.get(given.settings.api_key_env, ""))
    return application(bundle, digests, None if given.open_to_all else LOOPBACK)
