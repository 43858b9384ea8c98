"""Make vLLM's CPU build importable beside the CPU build of torch: `python -m unime_ray.models.vllm_cpu_setup`.

vLLM needs torchvision, and PyPI's torchvision is built for CUDA: beside a torch without CUDA its C++ operators do not
load, and importing it fails with `operator torchvision::nms does not exist`. Nothing here calls those operators; they
only have to be declared. This script puts a hook into the environment it runs in: from then on every Python process
declares them when, and only when, torchvision is about to be imported. Imports neither torch nor torchvision itself.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HOOK = "unime_ray_torchvision_hook"
SOURCE = '''"""Declares two operators that torchvision needs to be imported; see unime_ray.models.vllm_cpu_setup."""

import sys


class DeclareOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.modules[__name__].library = library  # declared for as long as it lives
        return None


sys.meta_path.insert(0, DeclareOperators())
'''


def install_hook(site_packages: Path) -> list[Path]:
    """Write the hook and the `.pth` line that loads it; the files written."""
    module, loader = site_packages / f"{HOOK}.py", site_packages / f"{HOOK}.pth"
    module.write_text(SOURCE)
    loader.write_text(f"import {HOOK}\n")
    return [module, loader]


def main() -> None:
    for file in install_hook(Path(sysconfig.get_paths()["purelib"])):
        print(f"wrote {file}")


if __name__ == "__main__":
    main()
