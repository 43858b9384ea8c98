"""The graph as a Ray Serve config file: written by `unime-ray serve build`, applied by `unime-ray serve deploy`.

Which models and which index are served stands in one place of the file, the `user_config` that every deployment shares:
when only that changes, Ray Serve hands it to the running replicas, which swap without failing a request. A change of
anything else starts replicas anew, one after the other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from unime_ray.artifacts import Run
from unime_ray.config_serve import ServeConfig, StageConfig
from unime_ray.errors import ConfigError
from unime_ray.serve.bundle import Bundle, choice_of, chosen, resolve_bundle, run_config
from unime_ray.serve.cli import APP, request_seconds
from unime_ray.serve.entry import IMPORT_PATH, GraphArgs
from unime_ray.serve.gate import LOOPBACK
from unime_ray.serve.shards import retriever_names

HEADER = """\
# Retrieve and rerank on Ray Serve. Apply it, and every change of it, with: unime-ray serve deploy FILE
# Another embedder, reranker or index under `user_config` is swapped in while requests are answered.
"""


def write_file(run: Run, settings: ServeConfig, target: Path, host: str, port: int) -> None:
    """Write the config file for `run`.

    Raises:
        ConfigError: the file is there already; a model is named that the run does not have.
    """
    if target.exists():
        raise ConfigError(f"{target} is already there; choose another name")
    bundle = resolve_bundle(run, run_config(run), settings)
    body = yaml.safe_dump(described(bundle, host, port), sort_keys=False, width=120)
    # One place to change the models: the other deployments refer to the first one's.
    target.write_text(HEADER + body.replace("id001", "models"))


def described(bundle: Bundle, host: str, port: int) -> dict[str, Any]:
    """The file's content."""
    config = bundle.config
    models = choice_of(bundle)
    stages = {"ingress": config.ingress, "encoder": config.encoder}
    stages |= dict.fromkeys(retriever_names(config), config.retriever)
    stages |= {"reranker": config.rerank} if bundle.reranker else {}
    settings = config.model_dump(exclude={"embedder", "reranker", "index"}, exclude_defaults=True)
    root = bundle.run.root
    args = {
        "run": root if "://" in root else os.path.abspath(root),
        "open_to_all": host not in LOOPBACK,
        "settings": settings,
    }
    application = {
        "name": APP,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args,
        "deployments": [_deployment(name, stage, models) for name, stage in stages.items()],
    }
    http = {"host": host, "port": port, "request_timeout_s": request_seconds(config)}
    quiet = {"enable_access_log": False}  # the ingress writes a line a request itself
    return {"proxy_location": "HeadOnly", "http_options": http, "logging_config": quiet, "applications": [application]}


def _deployment(name: str, stage: StageConfig, models: dict[str, Any]) -> dict[str, Any]:
    scales = stage.max_replicas > stage.min_replicas
    scaling = {"min_replicas": stage.min_replicas, "max_replicas": stage.max_replicas}
    replicas = {"autoscaling_config": scaling} if scales else {"num_replicas": stage.min_replicas}
    resources = {"num_cpus": stage.num_cpus, "num_gpus": stage.num_gpus}
    return {"name": name, **replicas, "ray_actor_options": resources, "user_config": models}


def deploy_file(file: Path) -> None:
    """Apply the file to the Ray cluster connected to; returns once Ray Serve has taken it.

    Raises:
        ConfigError: the file cannot be read, or names a model or an index that cannot be served.
    """
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    content = check_file(file)
    schema = ServeDeploySchema.model_validate(content)
    serve.start(http_options=content["http_options"], proxy_location=content["proxy_location"])
    client = _get_global_client()
    assert client is not None, "it was started above"
    # As Ray Serve's own command line does: its public functions take Python objects only.
    client.deploy_apps(schema)


def check_file(file: Path) -> dict[str, Any]:
    """The file's content, once what it asks for is known to be servable: a bad name fails here, not in a replica."""
    try:
        content = yaml.safe_load(file.read_text())
        application = content["applications"][0]
        given = GraphArgs.model_validate(application["args"])
        choices = [each.get("user_config") or {} for each in application["deployments"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{file}: no config of `unime-ray serve build` ({' '.join(str(error).split())})") from error
    if any(choice != choices[0] for choice in choices):
        raise ConfigError(f"{file}: every deployment must have the same user_config, or stages would not fit together")
    run = Run(given.run)
    chosen(resolve_bundle(run, run_config(run), given.settings), choices[0])
    return content
