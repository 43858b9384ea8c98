"""The import hook that lets vLLM's CPU build run beside the CPU build of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from unime_ray.models.vllm_cpu_setup import HOOK, install_hook


@pytest.mark.slow
def test_the_hook_declares_operators_only_when_torchvision_is_imported(tmp_path: Path) -> None:
    install_hook(tmp_path)
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text("import torch\nseen = torch._C._jit_get_all_schemas()\n")
    code = (
        f"import sys, site; site.addsitedir({str(tmp_path)!r}); assert {HOOK!r} in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "import torchvision\n"
        "names = {s.name for s in torchvision.seen if s.name.startswith('torchvision::')}\n"
        "import torch; assert torch.version.cuda or names == {'torchvision::nms', 'torchvision::qnms'}, names\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=280)


def test_the_two_lists_of_versions_agree() -> None:
    root = Path(__file__).parents[2]
    lines = [(root / name).read_text().splitlines() for name in ("constraints.txt", "requirements-vllm.txt")]
    below, above = ([line for line in part if line and not line.startswith("#")] for part in lines)
    pinned = dict(line.split("==") for line in below)
    assert all("==" in line for line in above) and len(above) > 50
    for name, version in (line.split("==") for line in above):
        assert pinned.get(name, version) == version, f"{name}: .venv-vllm would hide another version of .venv"
    assert not {"torch", "triton", "torchaudio", "torchcodec"}.intersection(line.split("==")[0] for line in above)
