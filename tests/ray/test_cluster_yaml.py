"""cluster.yaml passes the validation that `ray up` would do."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def test_ray_accepts_the_cluster_description():
    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    validate_config(config)
    workers = {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    assert {name for name, node in workers.items() if node["resources"].get("GPU")} == {"gpu"}
    assert all("IamInstanceProfile" in node["node_config"] for node in workers.values()), "or they reach no bucket"
    assert all(node["min_workers"] == 0 for node in workers.values()), "groups scale from zero"


def test_nodes_get_every_dependency_of_the_package():
    project = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]
    commands = " ".join(yaml.safe_load(CLUSTER.read_text())["setup_commands"])
    installed = {name_of(word) for word in shlex.split(commands)}
    assert {name_of(wanted) for wanted in project["dependencies"]} <= installed


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ]", requirement)[0]
