"""Pretrains the bundled tiny vision-language model, or measures a checkpoint.

python jobs/pretrain_tiny.py --out runs/tiny --minutes 60            # one Ray Train worker
python jobs/pretrain_tiny.py --out runs/tiny --minutes 60 --no-ray   # in this process
python jobs/pretrain_tiny.py --out runs/tiny --resume                # goes on after an interruption
python jobs/pretrain_tiny.py --evaluate runs/tiny/model              # figures.json beside the weights
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from unime_ray.errors import UnimeError  # noqa: E402
from unime_ray.train.pretrain import STATE_FILE, PretrainConfig, Pretrainer  # noqa: E402
from unime_ray.train.pretrain_plan import BatchShape  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="folder of log, state and the final model/")
    parser.add_argument("--data", default=str(ROOT / "unime_ray/data/demo"), help="folder of the two demo tables")
    parser.add_argument("--minutes", type=float, default=60.0, help="time budget; the learning rate follows it")
    parser.add_argument("--max-steps", type=int, default=None, help="stop (annealed) after so many steps")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--augmentation", type=float, default=1.0, help="strength; 0 turns it off")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the arithmetic")
    parser.add_argument("--model", type=json.loads, default={}, help='sizes as JSON, e.g. {"hidden": 128, "layers": 3}')
    parser.add_argument("--start", default=None, metavar="DIR", help="go on with this checkpoint's weights")
    parser.add_argument("--shape", type=json.loads, default={}, help="what a step holds, as JSON (BatchShape)")
    parser.add_argument("--hard", type=float, nargs=2, default=(0.05, 0.35), help="hard negatives ramp in between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--snapshot", default=None, help="folder that gets the averaged weights now and then")
    parser.add_argument("--snapshot-minutes", type=float, default=10.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-ray", action="store_true", help="train in this process")
    parser.add_argument("--evaluate", default=None, metavar="DIR", help="measure this checkpoint and exit")
    parser.add_argument("--retriever", default=None, metavar="DIR", help="whose nearest 50 --evaluate judges")
    return parser.parse_args(arguments)


def train(settings: dict) -> None:
    """The training loop of one worker; `settings` is the parsed command line."""
    torch.set_num_threads(settings["threads"])
    names = (
        "out",
        "data",
        "minutes",
        "max_steps",
        "learning_rate",
        "optimizer",
        "augmentation",
        "dtype",
        "model",
        "seed",
        "start",
    )
    config = PretrainConfig(
        **{name: settings[name] for name in names},
        shape=BatchShape(**settings["shape"]),
        hard_from=settings["hard"][0],
        hard_to=settings["hard"][1],
        snapshot=settings["snapshot"],
        snapshot_minutes=settings["snapshot_minutes"],
    )
    trainer = Pretrainer(config)
    if settings["resume"]:
        trainer.load_state(Path(config.out) / STATE_FILE)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        f"{len(trainer.pictures.pixels)} pictures, {len(trainer.drawn)} concepts, {parameters:,} parameters", flush=True
    )
    folder = trainer.run(_print)
    print(f"{folder}: {trainer.step} steps in {trainer.elapsed:.0f} s", flush=True)


def _print(numbers: dict[str, float]) -> None:
    shown = " ".join(f"{key} {value:.3g}" for key, value in numbers.items() if key != "elapsed")
    print(f"{time.strftime('%H:%M:%S')} {shown}", flush=True)


def train_on_ray(settings: dict) -> None:
    """The same loop as one Ray Train worker, so that it can be submitted to a cluster."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from unime_ray.cluster import connected

    out = Path(settings["out"]).resolve()
    with connected():
        TorchTrainer(
            train,
            train_loop_config=settings | {"out": str(out)},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": settings["threads"]}),
            run_config=RunConfig(name="pretrain_tiny", storage_path=str(out / "ray")),
        ).fit()


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a named error."""
    options = parse(arguments)
    try:
        if options.evaluate:
            from unime_ray.train.pretrain_eval import evaluate_checkpoint

            torch.set_num_threads(options.threads)
            retriever = Path(options.retriever) if options.retriever else None
            evaluate_checkpoint(Path(options.evaluate), Path(options.data), retriever=retriever)
        elif options.no_ray:
            train(vars(options))
        else:
            train_on_ray(vars(options))
    except UnimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
