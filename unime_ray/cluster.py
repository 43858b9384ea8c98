"""Where the work runs: the cluster named by RAY_ADDRESS (as under `ray job submit`), else one started here."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

LOGICAL_CPUS = 4
OBJECT_STORE_BYTES = 600 * 1024 * 1024


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect to Ray for the length of a `with` block.

    A local cluster gets at least four logical CPUs: Ray Data holds one for reading while actors hold theirs, so that
    with fewer a stage could wait for itself. Authentication is set explicitly, because driver and cluster must agree.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
    else:
        cpus = max(os.cpu_count() or 1, LOGICAL_CPUS)
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    try:
        yield
    finally:
        ray.shutdown()
