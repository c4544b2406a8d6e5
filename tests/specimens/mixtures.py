"""Mixtures of experts written by hand: every way to route that matters, with experts in lists and in one tensor.

Shapes: `T` tokens, `C` = 10 channels, `E` = 6 experts, `H` = 8 hidden channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import normal

CHANNELS, EXPERTS, HIDDEN, TAKEN = 10, 6, 8, 2
TOKENS = normal(24, CHANNELS)


class Router(nn.Module):
    """Scores `[T, E]` -> weights and numbers `[T, k]`; `kind` is how."""

    def __init__(self, kind: str, experts: int = EXPERTS) -> None:
        super().__init__()
        self.kind, self.num_experts, self.top_k = kind, experts, TAKEN
        self.linear = nn.Linear(CHANNELS, experts, bias=kind != "softmax")
        self.register_buffer("correction", 0.1 * torch.randn(experts) if kind == "sigmoid" else None)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers."""
        scores = self.linear(tokens)
        if self.kind == "softmax":  # Mixtral
            weights, numbers = scores.softmax(-1).topk(self.top_k)
            return weights / weights.sum(-1, keepdim=True), numbers
        if self.kind == "all":  # Qwen: probabilities of those that are taken do not sum to one
            return scores.softmax(-1).topk(self.top_k)
        if self.kind == "late":  # GPT-OSS
            values, numbers = scores.topk(self.top_k)
            return values.softmax(-1), numbers
        if self.kind == "first":  # Switch
            probabilities = scores.softmax(-1)
            numbers = probabilities.argmax(-1, keepdim=True)
            return probabilities.max(-1, keepdim=True).values, numbers
        scores = scores.sigmoid()  # DeepSeek
        numbers = (scores + self.correction).topk(self.top_k).indices
        weights = scores.gather(-1, numbers)
        if self.kind == "shares":
            return weights / scores.sum(-1, keepdim=True), numbers
        return weights / weights.sum(-1, keepdim=True), numbers


class Expert(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[T, C]`."""
        return self.down(torch.relu(self.up(tokens)))


class Listed(nn.Module):
    """Experts in a list."""

    def __init__(self, kind: str = "softmax", *, keyed: bool = False) -> None:
        super().__init__()
        self.router = Router(kind)
        members = {f"expert_{number}": Expert() for number in range(EXPERTS)}
        self.experts = nn.ModuleDict(members) if keyed else nn.ModuleList(members.values())

    def forward(self, tokens: Tensor) -> Tensor:
        """`[T, C]`."""
        weights, numbers = self.router(tokens)
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(
            self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts
        ):
            rows, places = torch.where(numbers == number)
            result = result.index_add(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return result


class Stacked(nn.Module):
    """Experts in one tensor."""

    def __init__(self, kind: str = "softmax", *, groups: int = 0) -> None:
        super().__init__()
        self.router = Grouped(groups) if groups else Router(kind)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, CHANNELS) / CHANNELS**0.5)
        self.up_bias = nn.Parameter(0.1 * torch.randn(EXPERTS, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, CHANNELS, HIDDEN) / HIDDEN**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[T, C]`."""
        weights, numbers = self.router(tokens)
        hidden = torch.einsum("tkhc,tc->tkh", self.up[numbers], tokens) + self.up_bias[numbers]
        return (torch.einsum("tkch,tkh->tkc", self.down[numbers], torch.relu(hidden)) * weights[..., None]).sum(1)


class Grouped(nn.Module):
    """Chooses the best group, then within it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.each = groups, EXPERTS // groups
        self.weight = nn.Parameter(torch.randn(EXPERTS, CHANNELS) / CHANNELS**0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers."""
        scores = functional.linear(tokens, self.weight).softmax(-1)
        best = scores.view(-1, self.groups, self.each).max(-1).values.topk(1).indices
        open_groups = torch.zeros(len(tokens), self.groups).scatter(1, best, 1.0)
        mask = open_groups[:, :, None].expand(-1, self.groups, self.each).reshape(len(tokens), -1)
        return scores.masked_fill(mask == 0, 0.0).topk(TAKEN)


class Net(nn.Module):
    """Mixtures between two layers, each with a way around it."""

    def __init__(self, *mixtures: nn.Module) -> None:
        super().__init__()
        self.first, self.mixtures, self.head = (
            nn.Linear(CHANNELS, CHANNELS),
            nn.ModuleList(mixtures),
            nn.Linear(CHANNELS, 4),
        )

    def forward(self, tokens: Tensor) -> Any:
        """`[T, 4]`."""
        tokens = self.first(tokens)
        for mixture in self.mixtures:
            tokens = tokens + mixture(tokens)
        return self.head(tokens)


def built(*mixtures: Callable[[], nn.Module], seed: int = 0) -> Net:
    """The network, seeded, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(*(build() for build in mixtures)).eval()


def barred(net: Net, gone: list[int]) -> Tensor:
    """Outputs if the first mixture's scores of these experts are so low that they are never chosen: by a hook only."""
    net = copy.deepcopy(net)
    router = net.mixtures[0].router
    penalty = torch.zeros(EXPERTS).index_fill_(0, torch.tensor(gone, dtype=torch.long), -1e9)
    router.linear.register_forward_hook(lambda _, __, scores: scores + penalty)
    if router.correction is not None:  # a sigmoid of -1e9 is zero, and zero plus a bias may still be chosen
        router.correction = router.correction + penalty
    with torch.no_grad():
        return net(TOKENS)
