"""Teachers that two processes spread over themselves: `torchrun teachers_together.py DIRECTORY`."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from tersor.core.task import Task
from tersor.distill import train
from tersor.distill.spread import held_bytes, spread
from tersor.errors import ConfigError
from tersor.train import Schedule

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)


class Layer(nn.Module):
    """Attention whose heads are counted by their size, and an MLP."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = (part(hidden) for part in (self.query, self.key, self.value))
        heads = [part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in parts]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        hidden = self.norm(hidden + self.output(mixed))
        return hidden + self.mlp(hidden)


class Encoder(nn.Module):
    """Tokens `[B, T]` to a dict of class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Layer(16, 4) for _ in range(3))
        self.classes = nn.Linear(16, 5)  # not even: stays whole

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"scores": scale * self.classes(hidden.mean(1)), "hidden": hidden}


def mlp() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4)]
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), *blocks, nn.Linear(32, 6))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=32, num_labels=3, **shape))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(RANK))


def tokens(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(RANK))


def asked(build: Callable[[], nn.Module], how: str, arguments: Any, **options: Any) -> dict[str, Any]:
    """Asks the spread teacher twice about this process's own batch, which has a size of its own."""
    teacher = seeded(build)
    before = copy.deepcopy(teacher.state_dict())
    spreading = spread(teacher, how, **options).train()
    apart = []
    for count in (3 + RANK, 2):
        args, kwargs = arguments(count)
        answer = spreading(*args, **kwargs)
        expected = teacher(*args, **kwargs)
        for found, wanted in zip(leaves(answer), leaves(expected), strict=True):
            assert not found.requires_grad
            apart.append(float((found - wanted.detach()).abs().max()))
    return {
        "apart": max(apart),
        "share": held_bytes(spreading) / held_bytes(teacher),
        "untouched": all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items()),
        "evaluating": not any(part.training for part in spreading.modules()),
    }


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [value[name] for name in value] if hasattr(value, "keys") else list(value)


def refused(build: Callable[[], nn.Module], how: str, **options: Any) -> str:
    try:
        spread(seeded(build), how, **options)(tokens(2, 5))
    except ConfigError as error:
        return str(error)
    return "nothing"


def distilled(parallel: str) -> dict[str, Any]:
    """Students of one teacher, whole or spread, are the same."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(9))
    students = []
    for how in (None, "sharded", "tensor", "pipeline"):
        teacher, student = seeded(mlp), seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6)))
        answering = teacher if how is None else spread(teacher, how)

        schedule = Schedule(epochs=2, batch_size=8, parallel=parallel)
        student = train(student, answering, Task(train=x), losses="mse", schedule=schedule).model
        students.append(student.state_dict())
    apart = [float((students[0][name] - other[name]).abs().max()) for other in students[1:] for name in other]
    return {"apart": max(apart)}


def rows(count: int) -> Any:
    return (numbers(count, 8),), {}


def sentences(count: int) -> Any:
    return (tokens(count, 5 + RANK),), {"scale": 2.0 + RANK}


def padded(count: int) -> Any:
    length = 6 + 2 * RANK
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[0, 4:] = 0
    return (), {"input_ids": tokens(count, length), "attention_mask": mask}


HEADS = {"layers.*.query": "colwise", "layers.*.key": "colwise", "layers.*.value": "colwise"} | {
    "layers.*.output": "rowwise"
}
BERT = {f"*.attention.self.{name}": "colwise" for name in ("query", "key", "value")} | {
    "*.attention.output.dense": "rowwise",
    "*.intermediate.dense": "colwise",
    "bert.encoder.layer.[0-9]*.output.dense": "rowwise",
}
CASES: dict[str, Callable[[], Any]] = {
    "mlp sharded": lambda: asked(mlp, "sharded", rows),
    "mlp tensor": lambda: asked(mlp, "tensor", rows),
    "mlp pipeline": lambda: asked(mlp, "pipeline", rows),
    "encoder sharded": lambda: asked(Encoder, "sharded", sentences),
    "encoder tensor": lambda: asked(Encoder, "tensor", sentences),
    "encoder tensor planned": lambda: asked(Encoder, "tensor", sentences, plan=HEADS),
    "bert sharded": lambda: asked(bert, "sharded", padded),
    "bert tensor": lambda: asked(bert, "tensor", padded),
    "bert tensor planned": lambda: asked(bert, "tensor", padded, plan=BERT),
    "students": lambda: distilled("data"),
    "sharded students": lambda: distilled("sharded"),
    "pipeline of no sequence": lambda: refused(Encoder, "pipeline"),
    "pattern that fits nothing": lambda: refused(Encoder, "tensor", plan={"nowhere.*": "colwise"}),
    "odd features": lambda: refused(Encoder, "tensor", plan={"classes": "colwise"}),
    "nothing to split": lambda: refused(lambda: nn.Sequential(nn.Linear(3, 5)), "tensor"),
}


if __name__ == "__main__":
    found = {name: case() for name, case in CASES.items()}
    torch.save(found, Path(sys.argv[1]) / f"{RANK}.pt")
    distributed.barrier()
