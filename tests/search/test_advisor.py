"""The advisor: families by what computes, presets that can be taken, and numbers that stand in the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tersor
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.machine import cpu_flags
from tersor.core.recipe import Recipe
from tersor.errors import ConfigError, ModelError
from tersor.recipes import preset_names, resolve
from tersor.runtimes import RUNTIMES, get_runtime, torch_storage
from tersor.search.advisor import NOT_MEASURED, Advice, abilities, advise
from tersor.search.estimate import estimate
from tersor.search.family import FamilyName, family_of, profile
from tersor.search.rules import Scenario, read_rules
from zoo import Cnn, Mlp, Transformer, integers, normal, seeded

ROOT = Path(__file__).parents[2]
WORDS, LENGTH = 40, 12
SCENARIOS = get_args(Scenario)
TIGHT = tersor.Budget(max_drop=0.01)


class Tagger(nn.Module):
    """Tokens `[B, T]` to next tokens `[B, T, V]`, or to one of three classes, by layers of its own kind."""

    def __init__(self, inner: nn.Module, answers: int, *, pooled: bool) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = (
            nn.Embedding(WORDS, 16),
            inner,
            nn.Linear(answers, 3 if pooled else WORDS),
        )
        self.pooled = pooled

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.inner(self.embedding(tokens))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden.mean(1) if self.pooled else hidden)


class Decoder(nn.Module):
    """A transformer whose tokens see only what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder_layers()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden, mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))


class Mixed(nn.Module):
    """A convolution, a GRU and linear layers, each with work of its own; `[B, 4, T]`."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.recurrent = nn.Conv1d(4, 16, 3, padding=1), nn.GRU(16, 16, batch_first=True)
        self.wide, self.head = nn.Linear(16, 200), nn.Linear(200, 3)

    def forward(self, signal: Tensor) -> Tensor:
        hidden = self.recurrent(self.convolution(signal).relu().transpose(1, 2))[0]
        return self.head(self.wide(hidden).relu()).mean(1)


def encoder_layers() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def task_of(x: Tensor, y: Tensor, **fields: Any) -> tersor.Task:
    return tersor.Task(train=(x[:40], y[:40]), report=(x[40:], y[40:]), **fields)


def labels(classes: int = 3) -> Tensor:
    return torch.arange(60) % classes


TOKENS = integers(WORDS, 60, LENGTH)
BUILD: dict[str, Callable[[], nn.Module]] = {
    "cnn": Cnn,
    "transformer": lambda: Tagger(encoder_layers(), 16, pooled=True),
    "rnn": lambda: Tagger(nn.LSTM(16, 32, batch_first=True), 32, pooled=False),
    "lm": lambda: Tagger(Decoder(), 16, pooled=False),
    "mlp": Mlp,
    "mixed": Mixed,
}
TASKS: dict[str, Callable[[], tersor.Task]] = {
    "cnn": lambda: task_of(normal(60, 3, 8, 8), labels(5)),
    "transformer": lambda: task_of(TOKENS, labels()),
    "rnn": lambda: task_of(TOKENS, TOKENS.roll(-1, 1)),
    "lm": lambda: task_of(TOKENS, TOKENS.roll(-1, 1)),
    "mlp": lambda: task_of(normal(60, 12), labels(4)),
    "mixed": lambda: task_of(normal(60, 4, LENGTH), labels()),
}


@cache
def preset(name: str) -> Recipe:
    return resolve(name, frozenset())


@cache
def advised(family: str, scenario: Any, runtime: str, budget: tersor.Budget | None = TIGHT) -> Advice:
    target = tersor.Target(runtime, threads=1)
    return advise(seeded(BUILD[family]), TASKS[family](), scenario=scenario, target=target, budget=budget)


# --- families


@pytest.mark.parametrize("family", get_args(FamilyName))
def test_a_family_is_known_by_what_computes(family: str) -> None:
    assert family_of(seeded(BUILD[family]), TASKS[family]()) == family


def test_attention_is_seen_where_no_name_tells_it() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.left(x)
            return self.head(nn.functional.scaled_dot_product_attention(a, self.right(x), a)).mean(1)

    assert family_of(seeded(Attends), task_of(normal(60, 5, 8), labels())) == "transformer"


def test_answers_for_every_token_make_no_language_model_if_later_tokens_are_seen() -> None:
    everything = seeded(lambda: Tagger(encoder_layers(), 16, pooled=False))
    assert family_of(everything, TASKS["lm"]()) == "transformer"
    tokens = {"input_ids": TOKENS % 24, "mask": torch.ones(60, 1, LENGTH), "labels": labels()}
    assert family_of(seeded(Transformer), tersor.Task(report=tokens, output="logits")) == "transformer"


def test_models_of_transformers_have_their_family() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    bert = transformers.BertConfig(**shape, intermediate_size=32, max_position_embeddings=16)
    gpt = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False, **ends
    )  # fmt: skip
    padded = torch.ones_like(TOKENS)
    padded[:, -5:] = 0
    batch = {"input_ids": TOKENS, "attention_mask": padded, "labels": labels(2)}
    task = tersor.Task(train=batch, output="logits")
    assert family_of(seeded(lambda: transformers.BertForSequenceClassification(bert)), task) == "transformer"
    assert family_of(seeded(lambda: transformers.BertForMaskedLM(bert)), task) == "transformer"
    assert family_of(seeded(lambda: transformers.GPT2LMHeadModel(gpt)), task) == "lm"


def test_shares_are_those_of_the_multiply_accumulates() -> None:
    found = profile(seeded(Cnn), TASKS["cnn"]())
    convolutions = 64 * 9 * (3 * 8 + 8 * 8)
    assert found.macs == convolutions + 128 * 5
    assert found.convolution == pytest.approx(convolutions / found.macs)
    assert (found.recurrent, found.attention) == (0.0, False)


def test_the_callers_model_stays_as_it_is(noticed: Callable[[nn.Module], str]) -> None:
    model = seeded(Cnn).train()
    model.stem.requires_grad_(False)
    before = noticed(model)
    advise(model, TASKS["cnn"](), scenario="edge", target=tersor.Target("onnxruntime"))
    assert noticed(model) == before


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(ModelError, match="does not run on the task's first examples"):
        advise(seeded(Mlp), TASKS["cnn"](), scenario="edge", target=tersor.Target("eager"))


# --- advice


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("family", get_args(FamilyName))
def test_what_is_recommended_can_run(family: str, runtime: str) -> None:
    for scenario in SCENARIOS:
        found = advised(family, scenario, runtime)
        assert (found.family, found.scenario, found.runtime) == (family, scenario, runtime)
        choices = (found.recommended, *found.alternatives)
        for choice in choices:
            recipe = preset(choice.preset)
            assert choice.recipe == recipe.as_data()
            assert {step.precision for step in recipe.steps} <= {*RUNTIMES[runtime].formats, None}
            assert choice.reasons
            assert choice.expected
            assert choice.source
        assert len({choice.preset for choice in choices}) == len(choices)
        assert found.recommended.preset != "convert"
        assert found.recommended.preset in found.following[0]


def test_a_scenario_gets_what_suits_it() -> None:
    assert advised("cnn", "server", "onnxruntime").recommended.preset == "int8"
    assert advised("cnn", "edge", "onnxruntime").recommended.preset == "cnn-edge"
    assert advised("transformer", "server", "onnxruntime").recommended.preset == "int8-dynamic"
    assert advised("transformer", "server", "openvino").recommended.preset == "int8"
    assert advised("transformer", "constrained", "onnxruntime").recommended.preset == "transformer-constrained"
    assert advised("rnn", "server", "onnxruntime").recommended.preset == "int8-dynamic"
    assert advised("rnn", "constrained", "onnxruntime").recommended.preset == "rnn-constrained"
    assert advised("lm", "constrained", "eager").recommended.preset == "lm-constrained"
    assert advised("cnn", "edge", "eager").recommended.preset == "prune-distill"
    assert advised("mixed", "server", "onnxruntime").recommended.preset == "int8-dynamic"


def test_what_is_recommended_leaves_less_of_the_model() -> None:
    server = advised("cnn", "server", "onnxruntime").recommended.estimate
    assert server.macs_after == server.macs == profile(seeded(Cnn), TASKS["cnn"]()).macs
    assert server.float_bytes / 4 == server.parameters == sum(p.numel() for p in seeded(Cnn).parameters())
    weights, outputs = 8 * 27 + 8 * 72 + 128 * 5, 8 + 8 + 5
    assert server.bytes_after == weights + 4 * outputs + 4 * (server.parameters - weights)
    pruned = advised("cnn", "constrained", "onnxruntime").recommended
    assert pruned.preset == "cnn-constrained"
    assert pruned.estimate.macs_after <= 0.5 * pruned.estimate.macs
    assert pruned.estimate.bytes_after < server.bytes_after
    half = advised("rnn", "gpu", "onnxruntime").recommended
    assert (half.preset, half.estimate.bytes_after * 2) == ("float16", half.estimate.float_bytes)


def test_estimated_bytes_are_close_to_those_of_the_file(problem: Any, deployed: Callable[[str, str], Any]) -> None:
    size = (deployed("onnxruntime", "int8").artifact / "model.onnx").stat().st_size
    context = Context(problem.task(), tersor.Target("onnxruntime", threads=1), problem.net)
    found = estimate(problem.model(), preset("int8"), context, macs=1)
    assert found.float_bytes == 4 * sum(parameter.numel() for parameter in problem.net.parameters())
    assert found.bytes_after < size < 1.2 * found.bytes_after


@pytest.mark.parametrize(("family", "name"), [("lm", "int4-weights"), ("rnn", "int8-dynamic"), ("mlp", "float16")])
def test_estimated_bytes_are_those_that_are_stored(family: str, name: str, tmp_path: Path) -> None:
    model, task = seeded(BUILD[family]), TASKS[family]()
    context = Context(task, tersor.Target("onnxruntime", threads=1), model)
    candidate = Candidate(model)
    for step in preset(name).steps:
        candidate = step.apply(candidate, context)
    torch_storage.write(candidate.module, candidate.plan, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 - no mapping
    assert stored == pytest.approx(estimate(model, preset(name), context, macs=1).bytes_after, rel=0.05)


def test_what_cannot_be_taken_is_passed_over_with_its_reason() -> None:
    found = advised("cnn", "edge", "eager")
    out = {item.method: item.reason for item in found.ruled_out}
    assert "runs only" in out["int8"]
    untrained = tersor.Task(calibrate=normal(20, 3, 8, 8))
    found = advise(seeded(Cnn), untrained, scenario="edge", target=tersor.Target("onnxruntime"))
    out = {item.method: item.reason for item in found.ruled_out}
    assert found.recommended.preset == "int8"
    assert "needs a 'train' split" in out["cnn-edge"]
    unlabelled = tersor.Task(train=normal(20, 3, 8, 8))
    found = advise(seeded(Cnn), unlabelled, scenario="edge", target=tersor.Target("onnxruntime"))
    assert "labels" in {item.method: item.reason for item in found.ruled_out}["cnn-edge"]
    single = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    found = advise(single, TASKS["mlp"](), scenario="constrained", target=tersor.Target("onnxruntime"))
    assert found.recommended.preset == "int8"
    assert "prune-recover-int8" in {item.method for item in found.ruled_out}


def test_a_drop_that_was_measured_beyond_the_budget_rules_a_preset_out() -> None:
    row = read_rules().by_name["minilm-half"]
    assert row.points is not None
    loose = advised("transformer", "edge", "onnxruntime", tersor.Budget(max_drop=row.points / 100 + 0.001))
    assert loose.recommended.preset == "transformer-edge"
    assert loose.recommended.measured == (row,)
    tight = advised("transformer", "edge", "onnxruntime")
    assert tight.recommended.preset == "int8-dynamic"
    reason = next(item.reason for item in tight.ruled_out if item.method == "transformer-edge")
    assert f"it cost {row.points:.2f} points on {row.model}" in reason
    assert "the budget is 1.00" in reason
    assert advised("transformer", "edge", "onnxruntime", None).recommended.preset == "transformer-edge"


def test_methods_that_do_not_pay_here_are_named() -> None:
    out = {item.method: item for item in advised("rnn", "server", "openvino").ruled_out}
    assert {"FP8", "NPU", "N:M and unstructured sparsity", "static int8", "bfloat16 arithmetic"} <= set(out)
    assert "1.87x smaller" in out["N:M and unstructured sparsity"].reason
    assert "dynamic int8" not in out
    assert "running on the GPU" not in out
    out = {item.method: item for item in advised("cnn", "gpu", "eager").ruled_out}
    assert {"dynamic int8", "running on the GPU", "4-bit kernels of PyTorch"} <= set(out)
    assert ("a GPU in this machine" in out) is not torch.cuda.is_available()


def test_abilities_are_those_of_the_processor_and_the_runtime() -> None:
    found = abilities(tersor.Target("onnxruntime"))
    assert get_runtime("onnxruntime").formats <= found
    assert ("vnni" in found) is any("vnni" in flag for flag in cpu_flags())
    assert ("amx_bf16" in found) is ("amx_bf16" in cpu_flags())
    assert ("cuda" in found) is torch.cuda.is_available()
    assert "npu" not in found
    assert "int8" not in abilities(tersor.Target("eager"))


def test_what_was_not_measured_says_so() -> None:
    found = advised("rnn", "constrained", "onnxruntime").recommended
    assert (found.measured, found.expected) == ((), (NOT_MEASURED,))


def test_unknown_scenarios_and_runtimes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"scenario: expected one of \['edge', .*got 'moon'"):
        advised("cnn", "moon", "eager")
    with pytest.raises(ConfigError, match=r"Target\.runtime: .*got 'abacus'"):
        advised("cnn", "edge", "abacus")


# --- the presets that came with it

NEW = [
    ("cnn", "cnn-edge"),
    ("cnn", "cnn-constrained"),
    ("transformer", "transformer-edge"),
    ("transformer", "transformer-constrained"),
    ("rnn", "rnn-constrained"),
    ("lm", "lm-constrained"),
]


@pytest.mark.parametrize(("family", "preset"), NEW, ids=[preset for _, preset in NEW])
def test_a_preset_of_a_family_runs_on_it(family: str, preset: str) -> None:
    model, recipe = seeded(BUILD[family]), resolve(preset, frozenset())
    context = Context(TASKS[family](), tersor.Target("onnxruntime", threads=1), model)
    expected = estimate(model, recipe, context, macs=profile(model, context.task).macs)
    candidate = Candidate(model)
    for step in recipe.steps:
        candidate = step.apply(candidate, context)
    assert [record.name for record in candidate.history] == [step.name for step in recipe.steps]
    left = sum(parameter.numel() for parameter in candidate.module.parameters())
    assert left == expected.parameters_after < expected.parameters
    assert expected.macs_after < 0.9 * expected.macs


def test_every_preset_that_is_advised_says_on_its_page_that_it_was_measured_or_not() -> None:
    page = (ROOT / "docs/pipelines.md").read_text()
    for _, preset in NEW:
        assert preset in preset_names()
        assert re.search(rf"^\| `{preset}` \|.*not measured", page, re.MULTILINE)
