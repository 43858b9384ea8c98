"""Shared fixtures: one local Ray cluster for the whole session, and a few tiny pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any Ray process starts: clusters of tests take no token, whatever the user's environment asks for.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four (logical) CPUs, shared by every test of the session."""
    import ray

    # Workers are not pytest: they find what tests hand them only where Python looks.
    paths = [str(Path(__file__).parent / "ray"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def picture(
    color: str | tuple[int, ...] = "red", size: tuple[int, int] = (16, 16), fmt: str = "PNG", mode: str = "RGB"
) -> bytes:
    """An encoded picture of one color."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, fmt)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tiny_pictures() -> dict[str, bytes]:
    """Eight 16x16 PNGs of different colors, by the color's name."""
    names = ("red", "green", "blue", "yellow", "purple", "orange", "black", "gray")
    return {name: picture(name) for name in names}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is ready to be trained on, with its checkpoint (see `tests.distributed.scene`)."""
    from tests.distributed.scene import build_scene

    root = tmp_path_factory.mktemp("scene")
    build_scene(root)
    return root
