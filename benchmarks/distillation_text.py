"""MiniLM on SST-2 with fewer layers: students made of its own layers, trained with and without it as a teacher.

    python benchmarks/distillation_text.py --data DIR --encoder DIR --out benchmarks/results/distillation_text.json

Students start from layers of the teacher, spread evenly, and see the 4,920 training sentences in the same order with
the same schedule; the last step counts. Accuracy is on the 872 + 2,000 sentences that neither has seen. Rows that the
file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_pruning import compared
from environment import describe
from tersor import hf
from tersor.core.batch import select_output
from tersor.core.task import Task
from tersor.distill import train
from tersor.distill.students import every_kth
from tersor.train import Schedule

SCHEDULE = Schedule(epochs=3, lr=1e-4, batch_size=32, optimizer="adamw", weight_decay=0.01, clip_norm=1.0)
LOSSES: dict[str, list[Any]] = {
    "none": ["task"],
    "kd": [{"kd": {"weight": 0.9, "temperature": 4.0}}, {"task": {"weight": 0.1}}],
}
LAYERS = (3, 2)


def right(model: nn.Module, task: Task) -> Tensor:
    """Whether each unseen sentence is answered right."""
    found = []
    with torch.no_grad():
        for role in ("report", "certify"):
            for batch in task.splits[role].batches(64):
                found.append(select_output(batch.call(model), task.output).argmax(1) == batch.labels)
    return torch.cat(found)


def show(done: int, total: int, facts: Any) -> None:
    """A line now and then."""
    if done % 50 == 0 or done == total:
        print(f"{time.strftime('%H:%M:%S')} {done}/{total} {dict(facts)}", flush=True)


def main() -> None:
    """Measures what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    text = options.data / "text"
    teacher = hf.load_model(options.encoder, options.data / "weights/minilm_sst2_fp16.safetensors")
    task = hf.text_task(
        options.encoder, train=text / "sst2_train.tsv", report=text / "sst2_dev.tsv", certify=text / "sst2_holdout.tsv"
    )
    base = right(teacher, task)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    known = {(row["layers"], row["name"]) for row in result["rows"]}
    for layers in LAYERS:
        for name, losses in LOSSES.items():
            if (layers, name) in known:
                continue
            print(layers, name, flush=True)
            student, worked = every_kth(teacher, layers=layers), time.process_time()
            done = train(student.module, teacher, task, losses=losses, schedule=SCHEDULE, seed=0, progress=show)
            row = {
                "layers": layers,
                "name": name,
                "kept": {path: list(kept) for path, kept in student.layers.items()},
                "losses": losses,
                "untrained_top1": 100 * float(right(student.module.eval(), task).double().mean()),
                **compared(right(done.model, task), base, "student"),
                "notes": list(done.notes),
                "processor_seconds": time.process_time() - worked,
            }
            result["rows"].append(row)
            result["environment"] = describe(threads=torch.get_num_threads(), seed=0, packages=("transformers",))
            result["n"], result["teacher_top1"] = len(base), 100 * float(base.double().mean())
            result["schedule"] = SCHEDULE.model_dump(mode="json")
            options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
