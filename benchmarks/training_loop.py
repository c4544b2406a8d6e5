"""What the training loop costs over a bare PyTorch loop, and how fast a ResNet-20 trains with each option.

    python benchmarks/training_loop.py --threads 2 --out benchmarks/results/training_loop.json

Overhead: both sides take the same batches in the same order, the same model, optimizer and learning rates; their final
weights must be equal, bit for bit. Each side of each round runs in a process of its own, in turns. Times are per step,
without the first steps; ratios are paired by round, of the time on the clock and of the processor's time, which other
programs disturb less. The small network is the hard case: its step takes half a millisecond.

Speed: the loop with the options of `Schedule`. Random images, so nothing is said about accuracy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from environment import describe
from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.train import Hooks, Schedule, fit

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cifar_resnet import CifarResNet

SEED = 0
WARM = 5  # first steps, not timed: memory is claimed, the model compiled
MLP_BATCH, MLP_STEPS = 64, 30  # times as many steps as of the ResNet
NETWORKS = ("ResNet-20", "MLP")
SIDES = ("bare", "fit")
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "channels_last": {"channels_last": True},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, channels_last": {"precision": "bfloat16", "channels_last": True},
    "compile": {"compile": True},
    "compile, bfloat16, channels_last": {"compile": True, "precision": "bfloat16", "channels_last": True},
}


def problem(name: str, batch: int, steps: int) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Network, inputs, labels and batch size; as many examples as one epoch of `steps` needs."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    if name == "MLP":
        batch, steps = MLP_BATCH, steps * MLP_STEPS
        net: nn.Module = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        shape: tuple[int, ...] = (64,)
    else:
        net, shape = CifarResNet(20), (3, 32, 32)
    examples = batch * (WARM + steps)
    # Few images, many times over: memory stays small, the work is the same.
    kept = min(examples, 20 * batch)
    inputs, labels = (
        torch.randn(kept, *shape, generator=generator),
        torch.randint(10, (kept,), generator=generator),
    )
    return net, inputs, labels, batch


def now() -> np.ndarray[Any, Any]:
    """Seconds on the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def bare(net: nn.Module, inputs: Tensor, labels: Tensor, schedule: Schedule) -> list[np.ndarray[Any, Any]]:
    """What one would write by hand; the time after each step."""
    optimizer, total, times = schedule.optimizer_for(net), schedule.total_steps(len(inputs)), []
    net.train()
    for epoch in range(schedule.epochs):
        order = torch.from_numpy(np.random.default_rng(SEED * 1_000_003 + epoch).permutation(len(inputs)))
        for chosen in order.split(schedule.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(len(times), total)
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(net(inputs[chosen]), labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            times.append(now())
    return times


def with_fit(net: nn.Module, inputs: Tensor, labels: Tensor, schedule: Schedule) -> list[np.ndarray[Any, Any]]:
    """The loop; the time after each step."""
    times: list[np.ndarray[Any, Any]] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return functional.cross_entropy(batch.call(module), batch.labels)

    hooks = Hooks(after_step=lambda: times.append(now()))
    fit(net, Split("train", (inputs, labels)), loss, schedule=schedule, seed=SEED, hooks=hooks)
    return times


def job(network: str, side: str, option: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training, in this process."""
    torch.set_num_threads(arguments.threads)
    net, inputs, labels, batch = problem(network, arguments.batch, arguments.steps)
    steps = arguments.steps * (MLP_STEPS if network == "MLP" else 1)
    epochs = -(-(WARM + steps) * batch // len(inputs))
    schedule = Schedule(epochs=epochs, batch_size=batch, lr=0.01, **OPTIONS[option])
    times = (bare if side == "bare" else with_fit)(net, inputs, labels, schedule)
    timed = len(times) - WARM
    seconds, processor = ((times[-1] - times[WARM - 1]) / timed).tolist()
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "steps": timed,
        "batch": batch,
        "weights": digest.hexdigest(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main() -> None:
    """Runs everything, or one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of the ResNet; the MLP makes 30 times more")
    parser.add_argument("--batch", type=int, default=128, help="of the ResNet")
    parser.add_argument("--job", nargs=3, metavar=("NETWORK", "SIDE", "OPTION"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/training_loop.json")
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(job(*arguments.job, arguments)))
        return

    def run(*what: str) -> dict[str, Any]:
        numbers = [
            str(value) for name in ("threads", "steps", "batch") for value in (f"--{name}", getattr(arguments, name))
        ]
        command = [sys.executable, __file__, *numbers, "--job", *what]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our script
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(*what, f"{1000 * found['seconds']:.3f} ms", file=sys.stderr)
        return found

    result: dict[str, Any] = {"environment": describe(threads=arguments.threads, seed=SEED), "overhead": {}}
    for network in NETWORKS:
        rounds = []
        for number in range(arguments.rounds):
            turn = SIDES if number % 2 == 0 else SIDES[::-1]
            found = {side: run(network, side, "float32") for side in turn}
            assert found["bare"]["weights"] == found["fit"]["weights"], "the two loops did not do the same work"
            rounds.append(found)
        row: dict[str, Any] = {side: spread([1000 * found[side]["seconds"] for found in rounds]) for side in SIDES}
        row["ratio"] = spread([found["fit"]["seconds"] / found["bare"]["seconds"] for found in rounds])
        row["processor_ratio"] = spread(
            [found["fit"]["processor_seconds"] / found["bare"]["processor_seconds"] for found in rounds]
        )
        row["added_us"] = spread([1e6 * (found["fit"]["seconds"] - found["bare"]["seconds"]) for found in rounds])
        result["overhead"][network] = row | {name: rounds[0]["fit"][name] for name in ("steps", "batch")}
    speeds: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for _ in range(arguments.rounds):
        for name in OPTIONS:
            found = run("ResNet-20", "fit", name)
            speeds[name].append(found["batch"] / found["seconds"])
    result["images_per_second"] = {name: spread(values) for name, values in speeds.items()}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
