"""Shapes: `B` batch, `T` tokens, `V` vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tersor.distill.sequences import IGNORED, Sequences, _drawn, generate
from tersor.errors import ConfigError, DataError, NonFiniteError, OutputError
from zoo import integers, seeded

VOCABULARY = 4


class Lstm(nn.Module):
    """Characters; what comes next depends on all before."""

    def __init__(self, sharpness: float = 0.5, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, vocabulary)
        self.sharpness = sharpness
        for parameter in self.parameters():  # so that what was written matters for what follows
            nn.init.normal_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.sharpness * self.head(self.dropout(self.lstm(self.embedding(tokens))[0]))


TEACHER = seeded(Lstm)
PROMPTS = integers(VOCABULARY, 6, 2)


def log_probability(teacher: nn.Module, tokens: Tensor, start: int) -> Tensor:
    """Of what follows the first `start` tokens of `[B, T]`."""
    with torch.no_grad():
        logs = teacher(tokens[:, :-1]).double().log_softmax(-1)
    return logs.gather(2, tokens[:, 1:, None])[:, start - 1 :, 0].sum(1)


def every(prompt: Tensor, length: int) -> Tensor:
    ends = torch.tensor(list(product(range(VOCABULARY), repeat=length)))
    return torch.cat([prompt.expand(len(ends), -1), ends], 1)


def test_greedy_takes_the_likeliest_token() -> None:
    written = generate(TEACHER, PROMPTS, length=5)
    tokens = PROMPTS
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, TEACHER(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(written.tokens, tokens)
    torch.testing.assert_close(written.log_probabilities, log_probability(TEACHER, tokens, 2))
    assert torch.equal(written.labels[:, 2:], tokens[:, 2:])
    assert bool((written.labels[:, :2] == IGNORED).all())


@pytest.mark.parametrize("seed", range(3))
def test_beams_of_every_sequence_find_the_mode(seed: int) -> None:
    teacher, length = seeded(Lstm, seed), 4
    found = generate(teacher, PROMPTS, length=length, beams=VOCABULARY**length)
    for prompt, tokens, score in zip(PROMPTS, found.tokens, found.log_probabilities, strict=True):
        candidates = every(prompt, length)
        logs = log_probability(teacher, candidates, 2)
        assert torch.equal(tokens, candidates[logs.argmax()])
        assert float(score) == pytest.approx(float(logs.max()))


def test_beams_of_every_sequence_find_the_mode_with_an_end() -> None:
    """Sequences that end early are shorter, and what would follow costs nothing."""
    teacher, length, eos = seeded(lambda: Lstm(1.0), 2), 4, 1
    found = generate(teacher, PROMPTS, length=length, beams=VOCABULARY**length, eos=eos)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        best = -float("inf")
        for size in range(1, length + 1):
            candidates = every(prompt, size)
            inner = candidates[:, 2:]
            ended = (inner[:, -1] == eos) | torch.tensor(size == length)
            candidates = candidates[ended & ~(inner[:, :-1] == eos).any(1)]
            logs = log_probability(teacher, candidates, 2)
            if float(logs.max()) > best:
                best, wanted = float(logs.max()), candidates[logs.argmax()]
        lengths.add(len(wanted))
        assert float(found.log_probabilities[row]) == pytest.approx(best)
        assert torch.equal(found.tokens[row, : len(wanted)], wanted)
        assert bool((found.tokens[row, len(wanted) :] == eos).all())
        assert torch.equal(found.labels[row, 2 : len(wanted)], wanted[2:])
        assert bool((found.labels[row, len(wanted) :] == IGNORED).all())
    assert len(lengths) > 1, "all ended alike: nothing was seen of an early end"


@given(st.integers(1, 20), st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_no_beam_is_likelier_than_the_mode_and_scores_are_true(beams: int, seed: int) -> None:
    teacher = seeded(Lstm, seed)
    few = generate(teacher, PROMPTS, length=3, beams=beams)
    mode = generate(teacher, PROMPTS, length=3, beams=VOCABULARY**3)
    assert bool((few.log_probabilities <= mode.log_probabilities + 1e-6).all())
    torch.testing.assert_close(few.log_probabilities, log_probability(teacher, few.tokens, 2))


def test_beams_find_what_greed_misses() -> None:
    greedy, beams = (generate(TEACHER, PROMPTS, length=6, beams=count).log_probabilities for count in (1, 16))
    assert float(beams.mean()) > float(greedy.mean()) + 1e-3


def test_drawn_tokens_have_the_teachers_frequencies() -> None:
    prompts = PROMPTS[:1].expand(20_000, 2)
    for temperature in (1.0, 2.0):
        written = generate(TEACHER, prompts, length=1, temperature=temperature, batch_size=20_000)
        frequencies = written.tokens[:, -1].bincount(minlength=VOCABULARY).double() / len(prompts)
        with torch.no_grad():
            wanted = (TEACHER(PROMPTS[:1])[0, -1].double() / temperature).softmax(-1)
        torch.testing.assert_close(frequencies, wanted, rtol=0, atol=0.015)
        torch.testing.assert_close(written.log_probabilities, log_probability(TEACHER, written.tokens, 2))


def test_not_even_the_smallest_chance_draws_what_is_forbidden() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2, dtype=torch.float64)
    assert _drawn(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [[1], [2]]


def same(first: Sequences, second: Sequences) -> bool:
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.labels, second.labels)


def test_the_seed_decides_and_the_batch_size_does_not() -> None:
    how: dict[str, Any] = {"length": 8, "temperature": 1.0, "eos": 0}
    random = torch.get_rng_state()
    written = generate(TEACHER, PROMPTS, **how, seed=7)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(written, generate(TEACHER, PROMPTS, **how, seed=7, batch_size=1))
    assert same(written, generate(TEACHER, PROMPTS, **how, seed=7, batch_size=4))
    assert not same(written, generate(TEACHER, PROMPTS, **how, seed=8))


def test_a_low_temperature_is_greedy() -> None:
    assert same(generate(TEACHER, PROMPTS, length=6), generate(TEACHER, PROMPTS, length=6, temperature=1e-4))


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"beams": 3}])
def test_after_the_end_there_is_padding_without_labels(how: dict[str, Any]) -> None:
    prompts = integers(VOCABULARY, 30, 2)
    written = generate(seeded(lambda: Lstm(0.3), 5), prompts, length=6, eos=1, pad=0, **how)
    ended = 0
    for tokens, labels in zip(written.tokens[:, 2:].tolist(), written.labels[:, 2:].tolist(), strict=True):
        stop = tokens.index(1) + 1 if 1 in tokens else len(tokens)
        ended += stop < len(tokens)
        assert labels == tokens[:stop] + [IGNORED] * (len(tokens) - stop)
        assert set(tokens[stop:]) <= {0}
    assert ended


def test_prompts_of_several_lengths_are_written_each_as_if_alone() -> None:
    prompts = [PROMPTS[0], PROMPTS[1, :1], torch.cat([PROMPTS[2], PROMPTS[3]]), PROMPTS[4]]
    written = generate(TEACHER, prompts, length=3, pad=2)
    assert written.tokens.shape == (4, 7)
    for row, prompt in enumerate(prompts):
        alone, size = generate(TEACHER, prompt[None], length=3), len(prompt)
        assert torch.equal(written.tokens[row, : size + 3], alone.tokens[0])
        assert torch.equal(written.labels[row, : size + 3], alone.labels[0])
        assert bool((written.tokens[row, size + 3 :] == 2).all())
        assert bool((written.labels[row, size + 3 :] == IGNORED).all())


def test_a_student_learns_from_what_was_written() -> None:
    """Ordinary cross-entropy on the dataset brings a fresh student to write like the teacher."""
    written = generate(TEACHER, integers(VOCABULARY, 64, 2, seed=1), length=6)
    tokens, labels = written.dataset().tensors
    assert tokens.shape == labels.shape == (64, 7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Lstm(1.0)
        student.dropout.p = 0.0
        optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            functional.cross_entropy(student(tokens).flatten(0, 1), labels.flatten()).backward()
            optimizer.step()
    fresh = seeded(lambda: Lstm(1.0), 9)
    theirs = generate(TEACHER, PROMPTS, length=6).tokens
    agreement = [
        float((generate(net, PROMPTS, length=6).tokens == theirs)[:, 2:].double().mean()) for net in (student, fresh)
    ]
    assert agreement[0] > 0.9
    assert agreement[1] < 0.6


def test_the_teacher_stays_as_it_is(noticed: Callable[[nn.Module], str]) -> None:
    teacher = seeded(Lstm).train()
    before = noticed(teacher)
    assert same(generate(teacher, PROMPTS, length=3), generate(TEACHER, PROMPTS, length=3))
    assert noticed(teacher) == before
    with pytest.raises(IndexError):
        generate(teacher, PROMPTS + VOCABULARY, length=3)
    assert noticed(teacher) == before


def test_a_model_of_transformers_writes_what_its_own_generate_writes() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1,
        initializer_range=0.6,
    )  # fmt: skip
    teacher, prompts = seeded(lambda: transformers.GPT2LMHeadModel(config)), integers(18, 5, 4) + 2
    for beams in (1, 4):
        wanted = teacher.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False,
            num_beams=beams, pad_token_id=0, eos_token_id=None, length_penalty=0.0,
        )  # fmt: skip
        assert torch.equal(generate(teacher, prompts, length=6, beams=beams).tokens, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length"),
        ({}, "length"),
        ({"length": 2, "temperature": -1.0}, "temperature"),
        ({"length": 2, "temperature": 1.0, "beams": 2}, "not both"),
        ({"length": 2, "top_k": 3}, "top_k"),
        ({"length": 2, "eos": VOCABULARY}, "eos, pad: expected tokens below the teacher's vocabulary of 4"),
        ({"length": 2, "pad": VOCABULARY}, "eos, pad: expected tokens below the teacher's vocabulary of 4"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(TEACHER, PROMPTS, **settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS.float(), r"prompt 0 is torch\.float32 \(2,\)"),
        (PROMPTS[0], r"prompt 0 is torch\.int64 \(\)"),
        (PROMPTS[:, :0], r"prompt 0 is torch\.int64 \(0,\)"),
        ([], "expected at least one"),
        ([PROMPTS[0], "text"], "prompt 1 is str"),
    ],
)
def test_wrong_prompts_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(TEACHER, prompts, length=2)


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, tokens: Tensor) -> Any:
        return self.answer(tokens)


def test_wrong_answers_are_refused() -> None:
    with pytest.raises(OutputError, match=r"must answer tokens \(6, 2\) with logits"):
        generate(Answering(lambda tokens: torch.zeros(len(tokens), 4)), PROMPTS, length=2)
    with pytest.raises(NonFiniteError, match=r"NaN or \+Inf after 2 tokens"):
        generate(Answering(lambda tokens: torch.full((*tokens.shape, 4), torch.nan)), PROMPTS, length=2)
    pair = Answering(lambda tokens: (None, torch.zeros(*tokens.shape, 4)))
    with pytest.raises(OutputError, match="declare one"):
        generate(pair, PROMPTS, length=2)
    assert generate(pair, PROMPTS, length=2, output=1).tokens.shape == (6, 4)


def test_forbidden_tokens_are_never_written() -> None:
    def only_two(tokens: Tensor) -> Tensor:
        logits = torch.full((*tokens.shape, VOCABULARY), -torch.inf)
        logits[..., 2] = 0.0
        return logits

    for how in ({}, {"temperature": 1.0}, {"beams": 9}):
        written = generate(Answering(only_two), PROMPTS, length=3, **how)
        assert bool((written.tokens[:, 2:] == 2).all())
