"""The command line: results on standard output, everything else on standard error, and one exit code per cause."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import tersor
from cli.commands import Command
from tersor.recipes import load_recipe, parse_recipe, preset_names, preset_text

pytestmark = pytest.mark.usefixtures("in_problem")


def compress_arguments(out: Path, **changed: object) -> list[object]:
    """Options of the short run of this file: `target="openvino"` changes one, `target=None` leaves one out."""
    options = {"model": "problem:build", "weights": "weights.safetensors", "task": "problem:small_task", "out": out,
               "target": "eager", "recipe": "convert", "threads": 1, "rounds": 1, "max_drop": 0.05}  # fmt: skip
    chosen = {name: value for name, value in (options | changed).items() if value is not None}
    return ["compress", *(part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value))]


quick = pytest.mark.usefixtures("quick_latency")


# --- compress


@quick
def test_compress_prints_the_report_as_json(command: Command, tmp_path: Path) -> None:
    said = command(*compress_arguments(tmp_path / "run"), "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert report == json.loads((tmp_path / "run" / "artifact" / "report.json").read_text())
    assert report["verdict"] == "certified"
    assert report["target"]["threads"] == 1
    assert f"artifact: {tmp_path / 'run' / 'artifact'}" in said.err
    assert "report.html" in said.err


@quick
def test_compress_prints_a_table_without_json(command: Command, tmp_path: Path) -> None:
    said = command(*compress_arguments(tmp_path / "run"))
    assert said.code == 0
    assert "ertified" in said.out
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(said.out)


@quick
def test_compress_without_weights_takes_the_model_as_it_is(command: Command, tmp_path: Path) -> None:
    said = command(*compress_arguments(tmp_path / "run", model="problem:trained", weights=None), "--json")
    assert said.code == 0
    assert json.loads(said.out)["baseline"]["metric"] > 0.9


@quick
def test_compress_takes_a_recipe_file_and_a_seed(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsteps:\n  - prune.unstructured: {sparsity: 0.3}\n")
    said = command(*compress_arguments(tmp_path / "run", recipe=file, seed=5), "--json")
    assert said.code == 0
    report = json.loads(said.out)
    assert report["recipe"]["name"] == "mine"
    assert report["environment"]["seed"] == 5
    assert report["coverage"]["parameters_pruned"] == pytest.approx(0.3, abs=0.01)


@quick
def test_models_that_print_do_not_spoil_the_json(command: Command, tmp_path: Path, problem: Any) -> None:
    module = problem.directory / "odd.py"
    module.write_text(
        "import problem\nfrom torch import nn\nprint('imported')\n"
        "class Chatty(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = problem.trained()\n"
        "    def forward(self, x):\n        print('called')\n        return self.inner(x)\n"
    )
    try:
        for options in (["--json"], ["--json", "--dry-run"]):
            said = command(*compress_arguments(tmp_path / "run", model="odd:Chatty", weights=None), *options)
            assert said.code == 0, said.err
            assert json.loads(said.out)["budget"]["max_drop"] == 0.05
            assert "called" in said.err
    finally:
        module.unlink()


@quick
def test_compress_goes_on_where_it_was(command: Command, tmp_path: Path) -> None:
    first = command(*compress_arguments(tmp_path / "run"), "--json")
    again = command(*compress_arguments(tmp_path / "run"), "--json")
    assert (first.code, again.code) == (0, 0)
    assert first.out == again.out


@quick
@pytest.mark.parametrize("option", ["--json", None])
def test_a_budget_that_is_not_met_ends_with_3(command: Command, tmp_path: Path, option: str | None) -> None:
    file = tmp_path / "harsh.yaml"
    file.write_text("steps:\n  - prune.unstructured: {sparsity: 0.97}\n")
    arguments = compress_arguments(tmp_path / "run", recipe=file)
    said = command(*arguments, *([option] if option else []))
    assert said.code == 3
    assert (tmp_path / "run" / "artifact" / "manifest.json").exists()
    if option:
        assert json.loads(said.out)["verdict"] == "not certified"
    else:
        assert "ot certified" in said.out


@pytest.mark.slow
def test_compress_in_a_process_of_its_own(problem: Any, tmp_path: Path) -> None:
    arguments = compress_arguments(
        tmp_path / "run", target="onnxruntime", recipe="auto", task="problem:task", max_drop=0.02
    )
    command = [sys.executable, "-m", "tersor", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=problem.directory, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"]["name"] == "int8"
    assert report["certificate"]["certified"]
    assert "step 1 of 1: quantize.static" in done.stderr


# --- dry run


def test_a_dry_run_prints_the_plan_and_writes_nothing(problem: Any, tmp_path: Path) -> None:
    """In a process of its own, so that nothing else can write to its standard output unseen."""
    program = Path(sys.executable).with_name("tersor")
    assert program.exists()
    arguments = compress_arguments(tmp_path / "runs" / "run", target="onnxruntime", recipe="auto")
    command = [str(program), *map(str, arguments), "--dry-run", "--json"]
    done = subprocess.run(command, cwd=problem.directory, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["recipe"]["name"] == "int8"
    assert [list(step) for step in plan["recipe"]["steps"]] == [["quantize.static"]]
    assert plan["splits"] == {"train": 200, "certify": 200, "report": 50, "calibrate": 200}
    assert plan["parameters"] == sum(parameter.numel() for parameter in problem.net.parameters())
    assert plan["inputs"] == {"input": ["float32", "batch", 1, 8, 8]}
    assert plan["budget"]["max_drop"] == 0.05
    assert plan["out"] == str(tmp_path / "runs" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "code", "word"),
    [
        ({"max_drop": 0.001}, 2, "SplitTooSmallError"),
        ({"recipe": "int8"}, 5, "UnsupportedError"),
        ({"weights": "missing.safetensors"}, 4, "ArtifactError"),
    ],
)
def test_a_dry_run_finds_what_is_wrong(
    command: Command, tmp_path: Path, changed: dict[str, object], code: int, word: str
) -> None:
    said = command(*compress_arguments(tmp_path / "run", **changed), "--dry-run")
    assert said.code == code
    assert said.out == ""
    assert said.err.startswith(f"{word}: ")
    assert list(tmp_path.iterdir()) == []


# --- errors


@quick
@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"model": "problem"}, 2, ["ConfigError", "--model", "package.module:name"]),
        ({"model": "nowhere:build"}, 2, ["ConfigError", "--model", "nowhere"]),
        ({"model": "problem:bild"}, 2, ["ConfigError", "'problem' has no 'bild'"]),
        ({"model": "problem:images"}, 2, ["ConfigError", "torch.nn.Module", "tuple"]),
        ({"task": "problem:build"}, 2, ["ConfigError", "--task", "tersor.Task", "Sequential"]),
        ({"recipe": "int9"}, 2, ["ConfigError", "int9", "int8"]),
        ({"target": "tensorflow"}, 2, ["ConfigError", "tensorflow", "onnxruntime"]),
        ({"max_drop": -1}, 2, ["ConfigError", "max_drop"]),
        ({"confidence": 1.5}, 2, ["ConfigError", "confidence"]),
        ({"max_drop": 0.001}, 2, ["SplitTooSmallError", "certify"]),
        ({"threads": 0}, 2, ["--threads"]),
        ({"rounds": "many"}, 2, ["--rounds"]),
        ({"weights": "nothing.pt"}, 4, ["ArtifactError", "nothing.pt", "does not exist"]),
        ({"recipe": "int8"}, 5, ["UnsupportedError", "eager", "int8"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_input_has_its_code_and_words(
    command: Command, tmp_path: Path, changed: dict[str, object], code: int, words: list[str]
) -> None:
    said = command(*compress_arguments(tmp_path / "run", **changed), "--json")
    assert said.code == code
    assert said.out == ""
    assert [word for word in words if word not in said.err] == []
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_option_is_a_usage_error(command: Command) -> None:
    said = command("compress", "--model", "problem:build")
    assert said.code == 2
    assert "--task" in said.err
    assert said.out == ""


def test_an_unknown_command_is_a_usage_error(command: Command) -> None:
    assert command("compres").code == 2


def test_weights_that_fit_another_model(command: Command, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    said = command(*compress_arguments(tmp_path / "run", weights=tmp_path / "w.safetensors"))
    assert said.code == 2
    assert said.err.startswith("ModelError: ")
    assert "do not fit Sequential" in said.err


@quick
def test_a_directory_of_another_run_ends_with_4(command: Command, tmp_path: Path) -> None:
    assert command(*compress_arguments(tmp_path / "run")).code == 0
    said = command(*compress_arguments(tmp_path / "run", seed=1))
    assert said.code == 4
    assert said.err.startswith("OutputDirectoryError: ")
    assert "its seed differ" in said.err


def test_a_runtime_that_is_not_installed_ends_with_5(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    said = command(*compress_arguments(tmp_path / "run", target="openvino"))
    assert said.code == 5
    assert said.err.startswith("RuntimeUnavailableError: ")
    assert "pip install 'tersor[openvino]'" in said.err


def test_an_unexpected_error_is_not_hidden(command: Command, tmp_path: Path, problem: Any) -> None:
    """It ends the process with a traceback and code 1, as every Python program."""
    module = problem.directory / "odd.py"
    module.write_text("def build():\n    return 1 / 0\n")
    try:
        with pytest.raises(ZeroDivisionError):
            command(*compress_arguments(tmp_path / "run", model="odd:build"))
    finally:
        module.unlink()


# --- measure, report, verify


@pytest.fixture
def artifact(deployed: Any) -> Path:
    found: Path = deployed("onnxruntime", "int8").artifact
    return found


def test_measure_times_an_artifact_again(command: Command, artifact: Path) -> None:
    said = command("measure", artifact.parent, "--rounds", 1, "--batch", 3, "--json")
    assert said.code == 0, said.err
    numbers = json.loads(said.out)
    assert set(numbers) == {
        "latency_ms",
        "throughput",
        "peak_memory_bytes",
        "size_bytes",
        "runtime",
        "threads",
        "batch",
    }
    assert {"median", "p95", "iqr", "n"} <= set(numbers["latency_ms"])
    assert (numbers["runtime"], numbers["threads"], numbers["batch"]) == ("onnxruntime", 1, 3)
    assert numbers["size_bytes"] == (artifact / "model.onnx").stat().st_size
    assert numbers["throughput"] == pytest.approx(3000 / numbers["latency_ms"]["median"])


@pytest.mark.slow
def test_measure_says_that_weights_alone_cannot_run(command: Command, deployed: Any) -> None:
    said = command("measure", deployed("eager", "convert").artifact, "--rounds", 1)
    assert said.code == 2
    assert "weights only; give the class" in said.err


@pytest.mark.slow
def test_measure_speaks_to_people_too(command: Command, artifact: Path) -> None:
    said = command("measure", artifact, "--rounds", 1)
    assert said.code == 0
    assert said.out.startswith("onnxruntime, 1 threads, batch 1: median ")


def test_report_shows_a_finished_run(command: Command, artifact: Path, tmp_path: Path) -> None:
    said = command("report", artifact.parent, "--json")
    assert said.code == 0
    assert json.loads(said.out) == json.loads((artifact / "report.json").read_text())
    said = command("report", artifact, "--html", tmp_path / "new" / "page.html")
    assert said.code == 0
    assert "ertified" in said.out
    assert (tmp_path / "new" / "page.html").read_text() == (artifact / "report.html").read_text()


def test_report_names_a_page_that_cannot_be_written(command: Command, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = command("report", artifact, "--html", tmp_path / "file" / "page.html")
    assert said.code == 4
    assert said.err.startswith("OutputDirectoryError: ")


def test_verify_checks_every_file(command: Command, artifact: Path) -> None:
    said = command("verify", artifact.parent)
    assert said.code == 0
    assert said.out.startswith("intact: 5 files, Sequential, int8")
    said = command("verify", artifact, "--json")
    assert json.loads(said.out) == {
        "intact": True,
        "files": ["README.md", "model.onnx", "quantization.json", "report.html", "report.json"],
    }


@pytest.mark.parametrize("name", ["verify", "report", "measure"])
def test_a_damaged_artifact_ends_with_4(command: Command, artifact: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    content = bytearray((copy / "report.json").read_bytes())
    content[100] ^= 1
    (copy / "report.json").write_bytes(content)
    said = command(name, copy, "--json")
    assert said.code == 4
    assert said.out == ""
    assert said.err.startswith("IntegrityError: ")
    assert "report.json was changed" in said.err


@pytest.mark.parametrize("name", ["verify", "report", "measure"])
def test_a_place_without_an_artifact_ends_with_4(command: Command, tmp_path: Path, name: str) -> None:
    said = command(name, tmp_path / "nowhere")
    assert said.code == 4
    assert "is not an artifact" in said.err


# --- recipes


def test_recipes_are_listed_with_what_they_are_for(command: Command) -> None:
    said = command("recipes", "ls")
    assert said.code == 0
    lines = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert list(lines) == preset_names()
    assert all(not text.startswith("#") and len(text) > 10 for text in lines.values())


@pytest.mark.parametrize("name", preset_names())
def test_recipes_are_shown_and_copied_as_they_are(command: Command, tmp_path: Path, name: str) -> None:
    shown = command("recipes", "show", name)
    assert (shown.code, shown.out) == (0, preset_text(name))
    assert yaml.safe_load(shown.out)["name"] == name
    copied = command("recipes", "cp", name, tmp_path / "mine.yaml")
    assert (copied.code, copied.out.strip()) == (0, str(tmp_path / "mine.yaml"))
    assert load_recipe(tmp_path / "mine.yaml") == parse_recipe(preset_text(name))
    (tmp_path / "mine.yaml").write_text("precious")
    again = command("recipes", "cp", name, tmp_path / "mine.yaml")
    assert again.code == 4
    assert "already exists" in again.err
    assert (tmp_path / "mine.yaml").read_text() == "precious"


@pytest.mark.parametrize("arguments", [["show", "int9"], ["cp", "int9", "mine.yaml"]])
def test_a_recipe_that_does_not_exist_ends_with_2(command: Command, arguments: list[str]) -> None:
    said = command("recipes", *arguments)
    assert said.code == 2
    assert "int9" in said.err
    assert "prune-recover-int8" in said.err
    assert said.out == ""


# --- help and demo


@pytest.mark.parametrize("name", ["compress", "demo", "measure", "prune", "report", "verify", "recipes"])
def test_every_command_explains_itself(command: Command, name: str) -> None:
    said = command(name, "--help")
    assert said.code == 0
    assert "Usage:" in said.out
    assert len(said.out) > 200
    assert name in command("--help").out


@pytest.mark.slow
def test_the_demo_certifies(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")
    command = [sys.executable, "-m", "tersor", "demo", "--out", str(tmp_path / "demo"), "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    report = tersor.Report.model_validate_json(done.stdout)
    assert report.verdict == "certified"
    assert report.ratios.size > 2.5
    assert report.coverage.macs_quantized > 0.99
    assert report.deployed.metric is not None
    assert report.deployed.metric > 0.95


def test_the_demo_names_what_it_needs(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    said = command("demo", "--out", tmp_path / "demo")
    assert said.code == 5
    assert "pip install 'tersor[demo]'" in said.err
    assert list(tmp_path.iterdir()) == []
