"""Checkpoints that lie behind an address: known without copying their weights, and loaded where they are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest

from tests.unit.models_fixtures import make_item
from unime_ray import artifacts
from unime_ray.artifacts import local_folder
from unime_ray.config import PixelBudget
from unime_ray.models import names
from unime_ray.models.names import model_revision, resolve_model
from unime_ray.serve import bundle
from unime_ray.serve.engines import EncoderEngine

ADDRESS = "fake://bucket/tiny?endpoint_override=localhost:9000"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`fake://bucket/` is the folder of the packaged models; every address asked for is noted."""
    found: list[str] = []
    plain = artifacts.filesystem

    def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
        if not uri.startswith("fake://bucket/"):
            return plain(uri)
        found.append(uri)
        folder = str(Path(resolve_model("tiny")).parent)
        return pafs.SubTreeFileSystem(folder, pafs.LocalFileSystem()), uri.partition("?")[0][len("fake://bucket/") :]

    for module in (artifacts, names):
        monkeypatch.setattr(module, "filesystem", filesystem)
    return found


def test_only_what_is_asked_for_is_copied(opened: list[str]) -> None:
    tiny = Path(resolve_model("tiny"))
    whole, small = Path(local_folder(ADDRESS)), Path(local_folder(ADDRESS, without=(".safetensors",)))
    names_of = {path.name: path.read_bytes() for path in tiny.iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == names_of
    assert {path.name for path in small.iterdir()} == {name for name in names_of if not name.endswith(".safetensors")}


def test_what_is_here_is_not_copied(tmp_path: Path) -> None:
    assert local_folder("owner/name") == "owner/name" and local_folder(str(tmp_path)) == str(tmp_path)
    assert local_folder(f"file://{tmp_path}") == str(tmp_path)


def test_a_replica_copies_the_model_to_its_own_machine(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels to replicas is the address: a folder of the driver's is on no other machine."""
    copies: list[tuple[str, ...]] = []
    monkeypatch.setattr(bundle, "local_folder", lambda uri, without=(): copies.append(without) or local_folder(uri))
    settings = (None, "float32", PixelBudget(), 1024)
    remote = bundle._checkpoint("mine", ADDRESS, *settings)
    here = bundle._checkpoint("mine", "tiny", *settings)
    assert remote.path == ADDRESS and copies == [(".safetensors",)] * 2
    assert remote.revision == here.revision == model_revision(resolve_model("tiny")) and remote.dim == here.dim
    items = [make_item("red heart")]
    (found,), (wanted,) = (EncoderEngine(one).embed_groups([items]) for one in (remote, here))  # type: ignore[list-item]
    np.testing.assert_array_equal(found.vectors, wanted.vectors)
