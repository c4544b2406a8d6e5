"""Sequence-level distillation: the teacher writes, the student learns what it wrote by ordinary cross-entropy.

The mode of the teacher's distribution over sequences stands for the distribution, and beam search for its mode: Kim &
Rush 2016, https://arxiv.org/abs/1606.07947.

Shapes: `N` sequences, `B` of them at a time, `K` beams, `P` tokens of a prompt, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tersor.core.batch import select_output
from tersor.core.config import Config
from tersor.errors import ConfigError, DataError, NonFiniteError, OutputError

IGNORED = -100  # what PyTorch's cross-entropy leaves out
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Generation(Config):
    """How the teacher writes.

    Attributes:
        length: Tokens that are written at most, after the prompt.
        temperature: 0 takes the likeliest token (or beam); above, tokens are drawn from
            `softmax(logits / temperature)`.
        beams: How many beginnings are pursued at a time; 1 is greedy.
        eos: The token that ends a sequence; it belongs to it. None: all have full length.
        pad: What fills a sequence up; by default `eos`, or 0.
        batch_size: Prompts at a time; the teacher sees `beams` times as many rows.
        seed: Of drawn tokens.
    """

    length: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    beams: int = Field(default=1, ge=1)
    eos: int | None = Field(default=None, ge=0)
    pad: int | None = Field(default=None, ge=0)
    batch_size: int = Field(default=32, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Generation:
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("expected either beams, which search the mode, or a temperature, which draws; not both")
        return self

    @property
    def filler(self) -> int:
        """What fills up."""
        return self.pad if self.pad is not None else self.eos or 0


@dataclass(frozen=True)
class Sequences:
    """What a teacher wrote.

    Attributes:
        tokens: Prompt, what was written, padding: `[N, T]`.
        labels: `[N, T]`, the token where the teacher wrote one, -100 elsewhere; not shifted: where Hugging Face models
            are given both, they shift themselves.
        log_probabilities: What the teacher thinks of what it wrote, `[N]`, float64, at temperature 1.
    """

    tokens: Tensor
    labels: Tensor
    log_probabilities: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def dataset(self) -> TensorDataset:
        """Examples `(tokens [T - 1], next tokens [T - 1])`, for a student whose output t is about token t + 1."""
        return TensorDataset(self.tokens[:, :-1].contiguous(), self.labels[:, 1:].contiguous())


def generate(
    teacher: nn.Module, prompts: Tensor | Sequence[Tensor], *, output: str | int | None = None, **settings: Any
) -> Sequences:
    """Lets the teacher go on writing after prompts.

    ```python
    written = generate(teacher, prompts, length=64, beams=5, eos=1)
    loader = torch.utils.data.DataLoader(written.dataset(), batch_size=32, shuffle=True)
    ```

    The teacher is run on the whole beginning for every token, without a cache, so any causal model serves.

    Args:
        teacher: Token ids `[B, T]` -> logits `[B, T, V]`, or something with `logits`. It runs in evaluation mode and
            stays as it is.
        prompts: Token ids `[N, P]`, or N tensors `[P]` of any lengths; at least one token each.
        output: Key or index of the logits, if it returns a dict or tuple without `logits`.
        **settings: Fields of `Generation`: `length`, `temperature` (0), `beams` (1), `eos`, `pad`, `batch_size` (32),
            `seed` (0). The same seed gives the same tokens, whatever the batch size.

    Raises:
        ConfigError: if a setting is wrong.
        DataError: if prompts are no token ids, or empty.
        OutputError: if the teacher does not answer with logits for every token.
        NonFiniteError: if logits are NaN or +Inf.
    """
    wanted = Generation(**settings)
    given = _checked(prompts)
    generator = torch.Generator().manual_seed(wanted.seed)
    chance = torch.rand(
        len(given), wanted.length if wanted.temperature else 0, dtype=torch.float64, generator=generator
    )
    longest = max(len(prompt) for prompt in given)
    tokens = torch.full((len(given), longest + wanted.length), wanted.filler)
    labels = torch.full_like(tokens, IGNORED)
    scores = torch.zeros(len(given), dtype=torch.float64)
    with _evaluating(teacher), torch.no_grad():
        for rows in _batches(given, wanted.batch_size):
            prompt = torch.stack([given[row] for row in rows])
            beams = _Beams(teacher, prompt, wanted, output)
            written, score = beams.written(chance[rows])
            start, stop = prompt.shape[1], prompt.shape[1] + written.shape[1]
            tokens[rows, :start], tokens[rows, start:stop] = prompt, written
            labels[rows, start:stop] = torch.where(_counts(written, wanted.eos), written, IGNORED)
            scores[rows] = score
    return Sequences(tokens, labels, scores)


class _Beams:
    """Beginnings of the sequences of one batch, the likeliest first."""

    def __init__(self, teacher: nn.Module, prompts: Tensor, settings: Generation, output: str | int | None) -> None:
        self.teacher, self.settings, self.output = teacher, settings, output
        self.start = prompts.shape[1]
        parameter = next(teacher.parameters(), prompts)
        self.tokens = prompts.to(parameter.device)[:, None]  # [B, K, T]
        self.scores = torch.zeros(len(prompts), 1, dtype=torch.float64, device=self.tokens.device)  # [B, K]
        self.done = torch.zeros(len(prompts), 1, dtype=torch.bool, device=self.tokens.device)

    def written(self, chance: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that follow the prompt, `[B, T - P]`, and their log-probabilities, `[B]`."""
        for step in range(self.settings.length):
            self._extend(chance[:, step] if self.settings.temperature else None)
            if bool(self.done[:, 0].all()):  # the likeliest is at its end, and no other can become likelier
                break
        return self.tokens[:, 0, self.start :].cpu(), self.scores[:, 0].cpu()

    def _extend(self, chance: Tensor | None) -> None:
        logs = self._logs()  # [B, K, V]
        beams, size = logs.shape[1:]
        total = (self.scores[..., None] + logs).flatten(1)  # [B, K · V]
        if chance is None:
            scores, chosen = total.topk(min(self.settings.beams, beams * size))
        else:
            chosen = _drawn(logs[:, 0] / self.settings.temperature, chance)
            scores = total.gather(1, chosen)
        origin, token = chosen // size, chosen % size
        prefix = self.tokens.gather(1, origin[..., None].expand(-1, -1, self.tokens.shape[2]))
        self.tokens, self.scores = torch.cat([prefix, token[..., None]], 2), scores
        self.done = self.done.gather(1, origin)
        if self.settings.eos is not None:
            self.done = self.done | (token == self.settings.eos)

    def _logs(self) -> Tensor:
        """Log-probabilities of the next token in float64; a sequence at its end is only filled up, at no cost."""
        logits = self._logits(self.tokens.flatten(0, 1)).double()
        logits = logits.reshape(*self.tokens.shape[:2], -1)
        if bool((logits.isnan() | logits.isposinf()).any()):
            raise NonFiniteError(
                f"the teacher's logits became NaN or +Inf after {self.tokens.shape[2]} tokens; load a good checkpoint"
            )
        size, filler = logits.shape[-1], self.settings.filler
        if filler >= size or (self.settings.eos or 0) >= size:
            raise ConfigError(
                f"eos, pad: expected tokens below the teacher's vocabulary of {size}, got eos {self.settings.eos}, pad "
                f"{filler}"
            )
        logs = logits.log_softmax(-1)
        filled = torch.full((size,), -torch.inf, dtype=logs.dtype, device=logs.device)
        filled[filler] = 0.0
        return torch.where(self.done[..., None], filled, logs)

    def _logits(self, tokens: Tensor) -> Tensor:
        answer = self.teacher(tokens)
        named = (
            self.output is None
            and not isinstance(answer, Tensor)
            and isinstance(getattr(answer, "logits", None), Tensor)
        )
        logits: Tensor = answer.logits if named else select_output(answer, self.output)
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise OutputError(
                f"the teacher must answer tokens {tuple(tokens.shape)} with logits [B, T, vocabulary], got "
                f"{tuple(logits.shape)}"
            )
        return logits[:, -1]


def _drawn(logits: Tensor, chance: Tensor) -> Tensor:
    """Tokens `[B, 1]` by the inverse of the cumulated probabilities, so that a row depends on its own chance only."""
    cumulated = logits.softmax(-1).cumsum(-1)
    wanted = chance.to(logits.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, wanted, right=True).clamp(max=logits.shape[-1] - 1)


def _counts(written: Tensor, eos: int | None) -> Tensor:
    """Whether a token belongs to the sequence: up to the first `eos`, which does."""
    ends = written == (-1 if eos is None else eos)
    return ends.cumsum(1) - ends.long() == 0


def _checked(prompts: Tensor | Sequence[Tensor]) -> list[Tensor]:
    rows = list(prompts)
    if not rows:
        raise DataError("prompts: expected at least one, got none")
    for position, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.ndim != 1 or not len(row) or row.dtype not in INTEGERS:
            what = f"{row.dtype} {tuple(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
            raise DataError(f"prompts: expected integer token ids [N, P], P at least 1; prompt {position} is {what}")
    return [row.detach().cpu().long() for row in rows]


def _batches(prompts: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    """Rows of prompts of one length at a time."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    while order:
        length = len(prompts[order[0]])
        rows = [row for row in order[:size] if len(prompts[row]) == length]
        yield rows
        order = order[len(rows) :]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
