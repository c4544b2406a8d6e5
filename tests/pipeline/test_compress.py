"""`compress` from a trained model to a certified artifact, and what it leaves alone."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor.core.artifact import Manifest
from tersor.core.metrics import Metric
from tersor.core.report import Report
from tersor.distill import Recover
from tersor.measure import exact_paired, ledger
from tersor.pipeline.measuring import EVALUATION_BATCH
from tersor.prune import Unstructured
from tersor.quantize import Static
from tersor.train import Schedule

BUDGET = tersor.Budget(max_drop=0.02, rounds=1)
SMALL_BUDGET = tersor.Budget(max_drop=0.05, rounds=1)  # for the small task
EAGER = tersor.Target("eager", threads=1)
ONNX = tersor.Target("onnxruntime", threads=1)
MODEL_FILES = {"onnxruntime": ["model.onnx"], "openvino": ["model.bin", "model.xml"], "eager": ["model.safetensors"]}
RUNS = [("onnxruntime", "int8"), ("onnxruntime", "prune-recover-int8"), ("openvino", "int8"), ("eager", "convert")]

FACTS = {"metric", "metric_name", "size_bytes", "parameters", "nonzero_parameters", "macs", "latency_ms", "runtime",
         "precision", "peak_memory_bytes", "throughput"}  # fmt: skip

every_run = pytest.mark.parametrize(
    ("runtime", "recipe"), RUNS, ids=[f"{runtime}-{recipe}" for runtime, recipe in RUNS]
)


def pruning(sparsity: float = 0.5, epochs: int = 1) -> list[Any]:
    """Steps that any runtime can run."""
    return [Unstructured(sparsity=sparsity), Recover(schedule=Schedule(epochs=epochs, lr=0.01))]


def report_json(result: tersor.Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.artifact / "report.json").read_text())
    return found


def model_bytes(artifact: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(artifact.glob("model.*"))}


# --- end to end


@every_run
def test_it_deploys_and_certifies(deployed: Any, problem: Any, runtime: str, recipe: str) -> None:
    result = deployed(runtime, recipe)
    report = result.report
    assert result.certified
    assert report.verdict == "certified"
    certificate = report.certificate
    assert (certificate.method, certificate.exact, certificate.measures) == ("exact-paired", True, "metric")
    assert (certificate.n, certificate.max_drop, certificate.confidence) == (1000, 0.02, 0.95)
    assert certificate.drop <= certificate.upper_bound <= 0.02
    assert certificate.drop == pytest.approx((certificate.losses - certificate.gains) / 1000)
    assert certificate.times_asked == 1
    assert certificate.split_fingerprint == problem.task().splits["certify"].fingerprint
    expected = ["README.md", "manifest.json", *MODEL_FILES[runtime], "report.html", "report.json"]
    expected += ["quantization.json"] if "int8" in recipe else []
    expected += ["surgery.json"] if "prune" in recipe else []
    assert sorted(path.name for path in result.artifact.iterdir()) == sorted(expected)
    assert sorted(report.size_breakdown) == MODEL_FILES[runtime]


@every_run
def test_the_reported_metric_is_that_of_the_artifact(deployed: Any, problem: Any, runtime: str, recipe: str) -> None:
    result = deployed(runtime, recipe)
    x, y = problem.splits()["report"]
    session = tersor.load(result.artifact, model=problem.module.build if runtime == "eager" else None)
    right = [int(session(x[index : index + 1]).argmax()) == int(y[index]) for index in range(len(x))]
    assert result.report.deployed.metric == pytest.approx(np.mean(right))
    before = (problem.net(x).argmax(1) == y).double().mean()
    assert result.report.baseline.metric == result.report.runtime_baseline.metric == pytest.approx(float(before))


@every_run
def test_the_certificate_counts_what_the_artifact_answers(
    deployed: Any, problem: Any, runtime: str, recipe: str
) -> None:
    result = deployed(runtime, recipe)
    x, y = problem.splits()["certify"]
    session = tersor.load(result.artifact, model=problem.module.build if runtime == "eager" else None)
    after = np.array([int(session(x[index : index + 1]).argmax()) == int(y[index]) for index in range(len(x))])
    with torch.no_grad():
        before = torch.cat([problem.net(part).argmax(1) for part in x.split(EVALUATION_BATCH)]).numpy() == y.numpy()
    assert result.report.certificate.losses == int((before & ~after).sum())
    assert result.report.certificate.gains == int((after & ~before).sum())


@every_run
def test_the_pytorch_model_of_the_result_answers_like_the_artifact(
    deployed: Any, problem: Any, runtime: str, recipe: str
) -> None:
    result = deployed(runtime, recipe)
    x = problem.splits()["report"][0][:64]
    session = tersor.load(result.artifact, model=problem.module.build if runtime == "eager" else None)
    with torch.no_grad():
        expected = result.model(x)
    difference = (session(x) - expected).norm() / expected.norm()
    assert difference < (0.02 if "int8" in recipe else 1e-5)


def test_pruning_makes_zeros_that_survive_until_deployment(deployed: Any) -> None:
    import onnx
    from onnx.numpy_helper import to_array

    result = deployed("onnxruntime", "sparse-recover-int8")
    report = result.report
    assert report.coverage.parameters_pruned == pytest.approx(0.5, abs=0.01)
    assert report.deployed.nonzero_parameters < 0.52 * report.deployed.parameters
    assert any("no speed-up expected" in warning for warning in report.warnings)
    stored = [to_array(entry) for entry in onnx.load(result.artifact / "model.onnx").graph.initializer]
    codes = [array for array in stored if array.dtype == np.int8 and array.ndim >= 2]
    assert len(codes) == 4
    zeros, total = sum(int((array == 0).sum()) for array in codes), sum(array.size for array in codes)
    assert zeros / total >= 0.49
    assert [step.name for step in report.history] == ["prune.unstructured", "recover", "quantize.static"]


# --- the report


@every_run
def test_report_json_has_the_agreed_keys(deployed: Any, runtime: str, recipe: str) -> None:
    report = report_json(deployed(runtime, recipe))
    assert report["schema_version"] == 1
    agreed = {"schema_version", "baseline", "runtime_baseline", "deployed", "ratios", "certificate", "changes"}
    agreed |= {"coverage", "environment", "recipe"}
    assert agreed <= set(report)
    for role in ("baseline", "runtime_baseline", "deployed"):
        assert set(report[role]) == FACTS
        assert {"median", "p95", "iqr", "n"} <= set(report[role]["latency_ms"])
    assert set(report["ratios"]) == {"size", "latency", "latency_same_runtime", "macs"}
    agreed = {"max_drop", "confidence", "drop", "upper_bound", "n", "method", "certified"}
    assert agreed <= set(report["certificate"])
    assert report["recipe"]["name"] == recipe


@every_run
def test_the_numbers_fit_together(deployed: Any, problem: Any, runtime: str, recipe: str) -> None:
    result = deployed(runtime, recipe)
    report, raw = result.report, report_json(result)
    eager, same, now = report.baseline, report.runtime_baseline, report.deployed
    ratios = report.ratios
    assert (eager.runtime, same.runtime, now.runtime) == ("eager", runtime, runtime)
    assert (eager.precision, same.precision) == ("float32", "float32")
    assert now.precision == ("int8" if "int8" in recipe else "float32")
    assert now.size_bytes == sum((result.artifact / name).stat().st_size for name in MODEL_FILES[runtime])
    assert ratios.size == pytest.approx(eager.size_bytes / now.size_bytes)
    assert ratios.macs == pytest.approx(eager.macs / now.macs)
    # one round: the ratio of its medians is the ratio of all
    assert ratios.latency == pytest.approx(eager.latency_ms.rounds[0] / now.latency_ms.rounds[0])
    assert ratios.latency_same_runtime == pytest.approx(same.latency_ms.rounds[0] / now.latency_ms.rounds[0])
    parameters = sum(parameter.numel() for parameter in problem.net.parameters())
    assert eager.parameters == same.parameters == parameters
    assert eager.nonzero_parameters <= parameters
    macs = 16 * 9 * 64 + 64 * 16 * 9 * 16 + 96 * 64 * 9 * 16 + 96 * 4
    assert eager.macs == same.macs == macs
    if "prune" in recipe:
        pruning = report.history[0].pruning
        assert (pruning.parameters_before, pruning.macs_before) == (parameters, macs)
        parameters, macs = pruning.parameters_after, pruning.macs_after
        assert report.coverage.parameters_pruned == pytest.approx(1 - parameters / eager.parameters)
    assert (now.parameters, now.macs) == (parameters, macs)
    for facts in (eager, same, now):
        assert 0 < facts.latency_ms.best <= facts.latency_ms.median <= facts.latency_ms.p95
        assert facts.latency_ms.n >= 5
        assert facts.throughput == pytest.approx(1000 / facts.latency_ms.median)
        assert facts.peak_memory_bytes is None or 0 < facts.peak_memory_bytes < 1e9
    assert raw["environment"]["threads"] == 1
    assert raw["environment"]["versions"]["torch"] == torch.__version__
    assert raw["budget"]["max_drop"] == 0.02
    assert report.changes.n == 400
    assert report.changes.flips >= report.changes.right_to_wrong + report.changes.wrong_to_right
    assert now.metric - eager.metric == pytest.approx(
        (report.changes.wrong_to_right - report.changes.right_to_wrong) / 400
    )
    assert [row.name for row in report.changes.per_class] == ["a", "b", "c", "d"]
    assert sum(layer.parameters for layer in report.layers) == parameters
    assert sum(layer.macs for layer in report.layers) == macs


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_covers_the_network_and_shrinks_it(deployed: Any, runtime: str) -> None:
    report = deployed(runtime, "int8").report
    assert report.ratios.size > 2
    assert report.coverage.macs_quantized == 1
    assert report.coverage.parameters_quantized > 0.98
    assert report.coverage.parameters_pruned == 0
    weights = [layer for layer in report.layers if layer.kind in ("Conv2d", "Linear")]
    assert [layer.precision for layer in weights] == ["int8"] * 4
    assert all(0 < layer.weight_error < 0.02 for layer in weights)


def test_conversion_alone_changes_nothing(deployed: Any) -> None:
    report = deployed("eager", "convert").report
    assert report.ratios.size == 1
    assert report.changes.flips == 0
    assert report.certificate.losses == report.certificate.gains == 0
    assert report.coverage.parameters_quantized == report.coverage.macs_quantized == 0
    assert report.warnings == []


@every_run
def test_report_html_loads_and_runs_nothing(deployed: Any, runtime: str, recipe: str) -> None:
    page = (deployed(runtime, recipe).artifact / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "<script" not in page.lower()
    assert not re.search(r"\son\w+\s*=", page)
    loaded = re.findall(r"""(?:src|href|data|action|poster|srcset)\s*=\s*["']?([^"'\s>]+)""", page)
    loaded += re.findall(r"url\(\s*[\"']?([^\"')]+)", page) + re.findall(r"@import\s+[\"']?([^\"';]+)", page)
    assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == []
    assert "<link" not in page.lower()
    assert "<iframe" not in page.lower()
    assert "Certified" in page


@every_run
def test_report_json_reads_back_to_the_same_report(deployed: Any, runtime: str, recipe: str) -> None:
    result = deployed(runtime, recipe)
    assert tersor.Report.model_validate_json((result.artifact / "report.json").read_text()) == result.report


def test_the_card_says_how_to_load_it(deployed: Any) -> None:
    card = (deployed("onnxruntime", "int8").artifact / "README.md").read_text()
    assert "model.onnx" in card
    assert "noise over a pattern" in card
    assert "onnxruntime" in card


# --- what must not change


@dataclass(frozen=True)
class Watched:
    """A run on a model as a caller in the middle of fine-tuning has it, and what the caller had before and after."""

    result: tersor.Result
    model: nn.Module
    before: tuple[Any, ...]
    after: tuple[Any, ...]


@pytest.fixture(scope="module", params=["onnxruntime", "eager"])
def watched(
    request: pytest.FixtureRequest, problem: Any, noticed: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    model = problem.model().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)

    def state() -> tuple[Any, ...]:
        threads, random = torch.get_num_threads(), torch.random.get_rng_state().tolist()
        return noticed(model), threads, random, np.random.get_state()[1].tolist()

    steps = [Static(range_method="minmax"), *pruning(), Static()]
    recipe = tersor.Recipe(steps if request.param == "onnxruntime" else pruning(), name="mine")
    target = tersor.Target(request.param, threads=1)
    before = state()
    with untimed():
        out = tmp_path_factory.mktemp("watched") / "run"
        result = tersor.compress(model, problem.task(), out=out, budget=BUDGET, target=target, recipe=recipe)
    return Watched(result, model, before, state())


def test_the_callers_model_stays_as_it_is(watched: Watched) -> None:
    assert watched.after[0] == watched.before[0]
    ours = {parameter.data_ptr() for parameter in watched.model.parameters()}
    assert ours.isdisjoint(parameter.data_ptr() for parameter in watched.result.model.parameters())


def test_the_callers_random_numbers_and_threads_stay_as_they_are(watched: Watched) -> None:
    assert watched.after[1:] == watched.before[1:]


def test_quantize_prune_recover_quantize_works(watched: Watched) -> None:
    report = watched.result.report
    assert watched.result.certified
    assert report.recipe["name"] == "mine"
    assert report.coverage.parameters_pruned == pytest.approx(0.5, abs=0.01)
    if report.deployed.runtime == "eager":
        assert [step.name for step in report.history] == ["prune.unstructured", "recover"]
        assert report.deployed.precision == "float32"
        return
    assert [step.name for step in report.history] == [
        "quantize.static",
        "prune.unstructured",
        "recover",
        "quantize.static",
    ]
    assert report.coverage.parameters_quantized > 0.98
    assert report.deployed.precision == "int8"


@pytest.mark.usefixtures("quick_latency")
@pytest.mark.parametrize(
    ("runtime", "recipe"),
    [
        ("onnxruntime", "prune-recover-int8"),
        ("openvino", "int8"),
    ],
)
def test_the_same_seed_gives_the_same_bytes_and_certificate(
    problem: Any, deployed: Any, tmp_path: Path, runtime: str, recipe: str
) -> None:
    first = deployed(runtime, recipe)
    torch.manual_seed(12345)  # whatever the caller did before must not matter
    again = tersor.compress(
        problem.model(),
        problem.task(),
        out=tmp_path / "elsewhere" / "run",
        budget=BUDGET,
        target=tersor.Target(runtime, threads=1),
        recipe=recipe,
    )
    assert model_bytes(again.artifact) == model_bytes(first.artifact)
    assert again.report.certificate == first.report.certificate


@pytest.mark.usefixtures("quick_latency")
def test_another_seed_gives_another_model(problem: Any, tmp_path: Path) -> None:
    recipe = tersor.Recipe(pruning())
    model = nn.Sequential(nn.Dropout(0.1), problem.model())  # random in the model as well as in the order of the data
    files = [
        model_bytes(
            tersor.compress(
                model,
                problem.small_task(),
                out=tmp_path / str(number),
                budget=SMALL_BUDGET,
                target=EAGER,
                recipe=recipe,
                seed=seed,
            ).artifact
        )
        for number, seed in enumerate([0, 1, 0])
    ]
    assert files[0] == files[2] != files[1]


@pytest.mark.usefixtures("quick_latency")
def test_a_finished_run_is_returned_and_not_repeated(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tersor.Result:
        return tersor.compress(
            problem.model(), problem.task(), out=tmp_path / "run", budget=BUDGET, target=EAGER,
            recipe=tersor.Recipe(pruning()),
        )  # fmt: skip

    first = run()
    stamps = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*"))}

    def repeated(*args: object, **kwargs: object) -> None:
        raise AssertionError("deployed again")

    monkeypatch.setattr(sys.modules["tersor.pipeline.compress"], "deploy", repeated)  # the function hides the module
    monkeypatch.setattr(Recover, "apply", repeated)
    again = run()
    assert again.report == first.report
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*"))} == stamps
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


# --- tasks of every kind


class ByName(nn.Module):
    """Takes two inputs by name and returns a dict or a tuple."""

    def __init__(self, inner: nn.Module, form: str) -> None:
        super().__init__()
        self.inner = inner
        self.form = form

    def forward(self, picture: Tensor, shift: Tensor) -> Any:
        logits = self.inner(picture + shift[:, None, None, None])
        if self.form == "tensor":
            return logits
        return {"extra": -logits, "logits": logits} if self.form == "dict" else (-logits, logits)


@pytest.mark.usefixtures("quick_latency")
@pytest.mark.parametrize(
    ("form", "output", "target", "recipe"),
    [("tensor", None, EAGER, "convert"), ("dict", "logits", ONNX, "int8"), ("tuple", 1, EAGER, "convert")],
    ids=["tensor", "dict", "tuple"],
)
def test_dict_batches_and_declared_outputs(
    problem: Any, tmp_path: Path, form: str, output: str | int | None, target: tersor.Target, recipe: str
) -> None:
    splits = {
        role: {"picture": x, "shift": torch.zeros(len(x)), "labels": y} for role, (x, y) in problem.splits().items()
    }
    model = ByName(problem.model(), form).eval()
    result = tersor.compress(
        model, tersor.Task(**splits, output=output), out=tmp_path / "run", budget=BUDGET, target=target, recipe=recipe
    )
    assert result.certified
    assert result.report.baseline.metric > 0.9
    session = tersor.load(result.artifact, model=lambda: ByName(problem.module.build(), form))
    x = problem.splits()["report"][0][:5]
    by_name = session(shift=torch.zeros(5), picture=x)
    assert by_name.shape == (5, 4)
    torch.testing.assert_close(by_name, session(x, torch.zeros(5)), rtol=0, atol=0)
    assert (by_name.argmax(1) == problem.net(x).argmax(1)).double().mean() >= 0.8
    manifest = Manifest.model_validate_json(_without_digest(result.artifact))
    assert [spec.name for spec in manifest.signature.inputs] == ["picture", "shift"]
    assert manifest.signature.by_name


def _without_digest(artifact: Path) -> str:
    content = json.loads((artifact / "manifest.json").read_text())
    del content["digest"]
    return json.dumps(content)


@pytest.mark.usefixtures("quick_latency")
def test_without_labels_agreement_is_certified(problem: Any, tmp_path: Path) -> None:
    task = tersor.Task(**{role: x for role, (x, _) in problem.splits().items()})
    result = tersor.compress(
        problem.model(), task, out=tmp_path / "run", budget=BUDGET, target=EAGER, recipe=tersor.Recipe(pruning(0.2))
    )
    certificate = result.report.certificate
    assert certificate is not None
    assert (certificate.method, certificate.measures, certificate.exact) == ("clopper-pearson", "agreement", True)
    assert certificate.gains == 0
    assert result.report.baseline.metric == 1
    assert result.report.deployed.metric == pytest.approx(1 - result.report.changes.flips / 400)
    assert result.report.changes.right_to_wrong is None
    assert any("agreement with the original, not about accuracy" in warning for warning in result.report.warnings)


@pytest.mark.usefixtures("quick_latency")
def test_f1_is_certified_by_bootstrap_and_says_approximate(problem: Any, tmp_path: Path) -> None:
    result = tersor.compress(
        problem.model(), problem.task(metric="f1"), out=tmp_path / "run", budget=BUDGET, target=EAGER,
        recipe=tersor.Recipe(pruning(0.2)),
    )  # fmt: skip
    certificate = result.report.certificate
    assert certificate is not None
    assert (certificate.method, certificate.exact, certificate.measures) == ("paired-bootstrap", False, "metric")
    assert (certificate.losses, certificate.gains) == (None, None)
    assert result.report.deployed.metric_name == "f1"
    drop = result.report.baseline.metric - result.report.deployed.metric
    assert abs(drop) < 0.03
    for text in ((result.artifact / "report.html").read_text(), (result.artifact / "README.md").read_text()):
        assert "approximate" in text.lower()


@pytest.mark.usefixtures("quick_latency")
def test_a_metric_function_and_a_bounded_score_are_certified(problem: Any, tmp_path: Path) -> None:
    def balanced(outputs: Tensor, labels: Tensor) -> float:
        right = outputs.argmax(1) == labels
        return float(torch.stack([right[labels == label].double().mean() for label in range(4)]).mean())

    def brier(outputs: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return (outputs.softmax(1) - nn.functional.one_hot(labels, 4)).square().sum(1) / 2

    bounded = Metric("brier", brier, higher_is_better=False, bounds=(0.0, 1.0))
    found = {}
    for metric in (balanced, bounded):
        result = tersor.compress(
            problem.model(), problem.task(metric=metric), out=tmp_path / f"{len(found)}", target=EAGER,
            budget=tersor.Budget(max_drop=0.1, rounds=1), recipe=tersor.Recipe(pruning(0.2)),
        )  # fmt: skip
        found[result.report.deployed.metric_name] = result.report
    first, second = found["balanced"].certificate, found["brier"].certificate
    assert first is not None
    assert second is not None
    assert (first.method, first.exact, first.certified) == ("paired-bootstrap", False, True)
    assert (second.method, second.exact, second.certified) == ("betting", True, True)
    assert 0 < found["brier"].baseline.metric < 0.1
    with torch.no_grad():
        x, y = problem.splits()["report"]
        assert found["brier"].baseline.metric == pytest.approx(float(brier(problem.net(x), y).mean()))


@pytest.mark.usefixtures("quick_latency")
def test_labels_of_a_regression_are_welcome(problem: Any, tmp_path: Path) -> None:
    def within(outputs: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return ((outputs[:, 0] - labels).abs() < 0.5).double()

    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)).eval()
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = net(x)[:, 0]
    task = tersor.Task(
        train=(x[:300], y[:300]), certify=(x[300:800], y[300:800]), report=(x[800:], y[800:]),
        metric=Metric("within", within, bounds=(0.0, 1.0)),
        loss=lambda outputs, labels: (outputs[:, 0] - labels).square().mean(),
    )  # fmt: skip
    recipe = tersor.Recipe([Unstructured(sparsity=0.1), Recover(losses="mse")])
    result = tersor.compress(net, task, out=tmp_path / "run", budget=BUDGET, target=EAGER, recipe=recipe)
    assert result.certified
    assert result.report.certificate is not None
    assert result.report.certificate.method == "exact-paired"
    assert result.report.changes is None


# --- budgets


@pytest.mark.usefixtures("quick_latency")
def test_a_budget_out_of_reach_returns_the_best_so_far(problem: Any, tmp_path: Path) -> None:
    result = tersor.compress(
        problem.model(), problem.task(), out=tmp_path / "run", budget=BUDGET, target=EAGER,
        recipe=tersor.Recipe([Unstructured(sparsity=0.95)]),
    )  # fmt: skip
    report = result.report
    assert not result.certified
    assert report.verdict == "not certified"
    assert report.certificate is not None
    assert report.certificate.drop > 0.02
    assert report.certificate.examples_needed is None  # no number of examples would do
    assert any(warning.startswith("budget not met") for warning in report.warnings)
    assert tersor.load(result.artifact, model=problem.module.build)(problem.images()[0][:3]).shape == (3, 4)
    assert "Not certified" in (result.artifact / "report.html").read_text()


@pytest.mark.usefixtures("quick_latency")
def test_without_a_budget_no_certify_split_is_needed(problem: Any, tmp_path: Path) -> None:
    splits = problem.splits()
    task = tersor.Task(calibrate=splits["train"], report=splits["report"])
    result = tersor.compress(
        problem.model(), task, out=tmp_path / "run", budget=tersor.Budget(max_drop=None, rounds=1), target=EAGER,
        recipe="convert",
    )  # fmt: skip
    assert result.report.certificate is None
    assert result.report.verdict == "no certificate"
    assert not result.certified
    assert list(tmp_path.rglob("certify-ledger.jsonl")) == []


@pytest.mark.usefixtures("quick_latency")
def test_without_a_budget_a_certify_split_is_not_asked(problem: Any, tmp_path: Path) -> None:
    result = tersor.compress(
        problem.model(), problem.task(), out=tmp_path / "run", budget=tersor.Budget(max_drop=None, rounds=1),
        target=EAGER, recipe="convert",
    )  # fmt: skip
    assert result.report.certificate is None
    assert list(tmp_path.rglob("certify-ledger.jsonl")) == []


@pytest.mark.usefixtures("quick_latency")
def test_without_a_report_split_only_the_certificate_speaks(problem: Any, tmp_path: Path) -> None:
    splits = problem.splits()
    task = tersor.Task(calibrate=splits["train"], certify=splits["certify"])
    result = tersor.compress(problem.model(), task, out=tmp_path / "run", budget=BUDGET, target=EAGER, recipe="convert")
    assert result.certified
    assert result.report.changes is None
    assert result.report.deployed.metric is None


# --- the certify split is asked once


@pytest.mark.usefixtures("quick_latency")
def test_asking_the_split_again_is_counted_and_shown(problem: Any, tmp_path: Path) -> None:
    def run(name: str, sparsity: float) -> tersor.Result:
        return tersor.compress(
            problem.model(), problem.small_task(), out=tmp_path / name, budget=SMALL_BUDGET, target=EAGER,
            recipe=tersor.Recipe([Unstructured(sparsity=sparsity)]),
        )  # fmt: skip

    first, second, copy = run("first", 0.1), run("second", 0.2), run("copy of first", 0.1)
    asked = [result.report.certificate.times_asked for result in (first, second, copy)]  # type: ignore[union-attr]
    assert asked == [1, 2, 1]  # an equal run gets the equal answer: that is no further look
    certificates = [result.report.certificate for result in (first, second, copy)]
    assert certificates[2] == certificates[0]
    assert [certificate.confidence for certificate in certificates] == [0.95] * 3
    assert [certificate.level for certificate in certificates] == pytest.approx([0.955, 0.9955, 0.955])
    for certificate in certificates:
        losses, gains = certificate.losses, certificate.gains
        assert certificate.upper_bound == exact_paired.upper_bound(losses, gains, certificate.n, certificate.level)
    entries = [json.loads(line) for line in (tmp_path / "certify-ledger.jsonl").read_text().splitlines()]
    assert len(entries) == 2
    assert {entry["split"] for entry in entries} == {problem.small_task().splits["certify"].fingerprint}
    pages = [(result.artifact / "report.html").read_text() for result in (first, second)]
    assert "Asked 2 times" in pages[1]
    assert "asked by 2 runs, see certify-ledger.jsonl. This one was tested at 99.55\N{NO-BREAK SPACE}%" in pages[1]
    assert "Asked 2 times" not in pages[0]
    assert any("asked by 2 runs" in text and "tested at 99.55 %" in text for text in second.report.warnings)
    assert not any("asked by" in warning for warning in first.report.warnings)


@pytest.mark.usefixtures("quick_latency")
@pytest.mark.parametrize(("earlier", "bounded"), [(2, True), (3, False)])
def test_what_resampling_cannot_tell_is_not_certified(
    problem: Any, tmp_path: Path, earlier: int, bounded: bool
) -> None:
    task = problem.small_task(metric="f1")
    for number in range(earlier):
        ledger.ask(tmp_path / ledger.NAME, split=task.splits["certify"].fingerprint, run=str(number))
    result = tersor.compress(
        problem.model(), task, out=tmp_path / "run", budget=SMALL_BUDGET, target=EAGER, recipe="convert"
    )
    certificate = result.report.certificate
    assert certificate is not None
    assert (certificate.times_asked, certificate.level) == (earlier + 1, ledger.level_of(0.95, earlier + 1))
    assert (np.isfinite(certificate.upper_bound), certificate.certified) == (bounded, bounded)
    assert Report.model_validate_json((result.artifact / "report.json").read_text()).certificate == certificate
    assert any("the drop is unbounded" in warning for warning in result.report.warnings) is not bounded
    assert ("the loss could not be bounded" in (result.artifact / "report.html").read_text()) is not bounded


def test_a_printed_result_is_the_table(deployed: Any) -> None:
    result = deployed("openvino", "int8")
    text = str(result)
    for words in ("Certified", "openvino", "top1", "latency, median", "int8"):
        assert words in text
    assert result.html == result.artifact / "report.html"


@pytest.mark.usefixtures("quick_latency")
def test_the_deployed_weights_are_the_pruned_ones(problem: Any, tmp_path: Path) -> None:
    result = tersor.compress(
        problem.model(), problem.task(), out=tmp_path / "run", budget=BUDGET, target=EAGER,
        recipe=tersor.Recipe([Unstructured(sparsity=0.5)]),
    )  # fmt: skip
    stored = load_file(result.artifact / "model.safetensors")
    original = problem.net.state_dict()
    weights = {name: value for name, value in stored.items() if value.ndim >= 2}
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    assert zeros == round(0.5 * sum(value.numel() for value in weights.values()))
    for name, value in stored.items():
        kept = value != 0
        assert torch.equal(value[kept], original[name][kept])
