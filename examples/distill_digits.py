"""A small network learns handwritten digits from a larger one, and by itself; then it is deployed and certified.

    python examples/distill_digits.py --out runs/digits-student

Needs scikit-learn, whose 1,797 digits it takes. About ten seconds. A call that was interrupted goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import tersor
from tersor.train import Schedule, evaluation, fit, supervised

SCHEDULE = Schedule(epochs=20, lr=0.1, batch_size=32)
LOSSES = [{"kd": {"weight": 0.9}}, {"task": {"weight": 0.1}}]


def network(width: int) -> nn.Module:
    """Images `[B, 1, 8, 8]` -> logits `[B, 10]`."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def digits() -> tersor.Task:
    """The task; few labels to learn from, so that a teacher helps."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    shares = {"train": 0.3, "search": 0.2, "certify": 0.4, "report": 0.1}
    return tersor.Task.from_dataset((images, torch.from_numpy(data.target)), fractions=shares)


def run(out: Path) -> dict[str, float]:
    """Teacher, student alone, student taught, deployment; accuracy on the search split by name."""
    task = digits()
    torch.manual_seed(0)
    teacher, student = network(32), network(4)
    fit(teacher, task.splits["train"], supervised(task, SCHEDULE), schedule=SCHEDULE, seed=0)

    alone = tersor.distill.train(student, teacher, task, losses="task", schedule=SCHEDULE)
    taught = tersor.distill.train(
        student, teacher, task, losses=LOSSES, schedule=SCHEDULE, out=out / "distilled", cache=True
    )
    measure = evaluation(task)
    assert measure is not None
    models = {"teacher": teacher, "student alone": alone.model, "student taught": taught.model}
    found = {name: measure(model) for name, model in models.items()}
    for name, value in found.items():
        print(f"{name}: {value:.3f} right on the search split")
    budget = tersor.Budget(max_drop=0.05, rounds=3)
    print(tersor.compress(taught.model, task, budget=budget, out=out / "deployed", recipe="int8"))
    return found


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits-student"))
    run(parser.parse_args().out)


if __name__ == "__main__":
    main()
