"""The bench kit: runs without tersor, refuses what was changed, and what it measured comes home into the report."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.core.artifact import MANIFEST, read_manifest, verify
from tersor.core.files import sha256
from tersor.core.report import Latency, Report
from tersor.core.search import Choice
from tersor.core.signature import Signature, TensorSpec, random_batch
from tersor.errors import ConfigError, IntegrityError, OutputDirectoryError, UnsupportedError
from tersor.measure.latency import summarise
from tersor.pipeline.bench_kit import build_kit
from tersor.pipeline.documents import draw
from tersor.pipeline.imported import import_results, points_of, read_results
from tersor.pipeline.kit import bench
from tersor.report import render_card, render_html

CHOICE = Choice(skipped=("layer2.1",), widths={"layer1": 24}, format="int8")

# What another machine lacks: every process of the kit starts with this, fails where it imports one of these, and writes
# down at its end what it has imported.
OTHER_MACHINE = """
import atexit, os, sys
LACKS = {"tersor", "torch", "pydantic", "scipy", "onnx", "typer", "rich", "jinja2", "cloudpickle"}


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())


@atexit.register
def write_down():
    with open(os.path.join(os.path.dirname(__file__), f"{os.getpid()}.seen"), "w") as stream:
        stream.write("\\n".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


class Machine(NamedTuple):
    """A directory that makes every Python process with it on its path one of another machine."""

    path: Path

    def python(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *(str(argument) for argument in arguments)]
        environment = {**os.environ, "PYTHONPATH": str(self.path), "PYTHONWARNINGS": "error"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)  # noqa: S603

    def seen(self) -> list[set[str]]:
        return [set(path.read_text().splitlines()) for path in self.path.glob("*.seen")]


class Measured(NamedTuple):
    """A kit that was run."""

    kit: Path
    results: Path
    said: str
    modules: list[set[str]]


QUICK = ("--rounds", "2", "--seconds", "0.01", "--threads", "1")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    place = tmp_path_factory.mktemp("machine")
    (place / "sitecustomize.py").write_text(OTHER_MACHINE)
    return Machine(place)


@pytest.fixture(scope="module")
def compressed(problem: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tersor.Result]:
    """Whole runs, each made once, whose times in the report do not matter: `compressed("openvino")`."""

    @cache
    def run(runtime: str) -> tersor.Result:
        with untimed():
            return tersor.compress(
                problem.model(),
                problem.small_task(preprocessing="noise over a pattern"),
                out=tmp_path_factory.mktemp(runtime) / "run",
                budget=tersor.Budget(max_drop=0.05, rounds=1),
                target=tersor.Target(runtime, threads=1),
                recipe="convert" if runtime == "eager" else "int8",
            )

    return run


@pytest.fixture(scope="module")
def measured(compressed: Any, machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Both runtimes in one kit, measured on the other machine."""
    runs = [compressed(runtime).artifact.parent for runtime in ("onnxruntime", "openvino")]
    place = tmp_path_factory.mktemp("bench")
    build_kit(runs, place / "kit", choices={runs[0]: CHOICE})
    done = machine.python("bench.py", *QUICK, cwd=place / "kit")
    assert done.returncode == 0, done.stderr
    return Measured(place / "kit", place / "kit" / "results.json", done.stdout, machine.seen())


@pytest.fixture
def kit(measured: Measured, tmp_path: Path) -> Path:
    """A kit that a test may damage."""
    return Path(shutil.copytree(measured.kit, tmp_path / "kit"))


@pytest.fixture(params=["onnxruntime", "openvino"])
def run(request: pytest.FixtureRequest, compressed: Any, tmp_path: Path) -> Iterator[Path]:
    """A run directory whose artifact a test may change; the one that other tests share is as it was."""
    shared = compressed(request.param).artifact
    before = sha256(shared / MANIFEST)
    yield Path(shutil.copytree(shared.parent, tmp_path / "run"))
    assert sha256(shared / MANIFEST) == before


def changed(measured: Measured, place: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(measured.results.read_text())
    change(content)
    place.write_text(json.dumps(content))
    return place


# --- the kit


def test_the_other_machine_has_no_tersor(machine: Machine, tmp_path: Path) -> None:
    for package in ("tersor", "torch"):
        done = machine.python("-c", f"import {package}", cwd=tmp_path)
        assert done.returncode == 1
        assert "ModuleNotFoundError" in done.stderr


def test_a_kit_runs_on_numpy_and_the_runtimes_alone(measured: Measured) -> None:
    assert len(measured.modules) >= 3  # the one that was started, and one for each model
    assert not any({"tersor", "torch", "pydantic"} & seen for seen in measured.modules)
    runtimes = [seen & {"onnxruntime", "openvino"} for seen in measured.modules if "argparse" in seen]
    assert sorted(map(sorted, runtimes)) == [[], ["onnxruntime"], ["openvino"]]


def test_the_script_is_python_3_9_and_ascii() -> None:
    source = Path(bench.__file__).read_text(encoding="ascii")
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}  # fmt: skip # noqa: E501
    imported |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - {"numpy"} <= set(sys.stdlib_module_names)
    assert not {"fcntl", "resource", "multiprocessing"} & imported


def test_a_kit_has_the_models_and_what_they_are(measured: Measured, compressed: Any) -> None:
    kit = json.loads((measured.kit / "kit.json").read_text())
    for member, runtime in zip(kit["artifacts"], ("onnxruntime", "openvino"), strict=True):
        made = compressed(runtime)
        assert member["runtime"] == runtime
        assert (member["recipe"], member["threads"], member["batch"]) == ("int8", 1, 1)
        assert member["inputs"] == [{"name": "input", "dtype": "float32", "shape": [1, 1, 8, 8]}]
        assert member["built"]["median_ms"] == made.report.deployed.latency_ms.median
        for file, entry in member["files"].items():
            assert sha256(measured.kit / member["folder"] / file) == entry["sha256"] == sha256(made.artifact / file)
    first, second = kit["artifacts"]
    assert first["name"] != second["name"]
    assert set(second["files"]) == {"model.xml", "model.bin"}
    text = (measured.kit / "README.md").read_text()
    assert "pip install numpy onnxruntime openvino" in text
    assert "tersor measure --import results.json" in text


def test_names_differ_even_where_case_does_not_count(compressed: Any, tmp_path: Path) -> None:
    artifact = compressed("onnxruntime").artifact
    places = [tmp_path / "a" / "Net", tmp_path / "b" / "net", tmp_path / "c" / "schnelles Netz, 8 bit"]
    for place in places:
        shutil.copytree(artifact, place)
    kit = build_kit(places, tmp_path / "kit")
    assert [member.name for member in kit.artifacts] == ["Net", "net-2", "schnelles-Netz-8-bit"]


def test_an_artifact_that_needs_code_is_refused_and_named(compressed: Any, tmp_path: Path) -> None:
    runs = [compressed(runtime).artifact for runtime in ("onnxruntime", "eager")]
    with pytest.raises(UnsupportedError, match="compress it for onnxruntime or openvino") as caught:
        build_kit(runs, tmp_path / "kit")
    assert str(runs[1]) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_artifact_is_not_packed(run: Path, tmp_path: Path) -> None:
    file = next((run / "artifact").glob("model.*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="was changed"):
        build_kit([run], tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_kit_replaces_nothing(compressed: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputDirectoryError, match="already exists"):
        build_kit([compressed("onnxruntime").artifact], tmp_path)
    with pytest.raises(ConfigError, match="at least one artifact"):
        build_kit([], tmp_path / "kit")


# --- the script


def test_results_say_where_and_how(measured: Measured) -> None:
    results = json.loads(measured.results.read_text())
    assert results["kit"] == sha256(measured.kit / "kit.json")
    assert set(results["machine"]["versions"]) == {"numpy", "onnxruntime", "openvino"}
    assert (results["rounds"], results["machine"]["cores"]) == (2, os.cpu_count())
    for name, found in results["artifacts"].items():
        time = Latency(**found["latency"])
        assert len(time.rounds) == 2
        assert time.n >= 10
        assert 0 < time.best <= time.median <= time.p95
        assert len(time.histogram) == 201
        assert name in measured.said
        assert f"{time.median:.3f}" in measured.said
        if Path("/proc/self/clear_refs").exists():
            assert found["peak_memory_bytes"] > 0


@given(st.lists(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_times_are_summed_up_as_tersor_does(rounds: list[list[float]]) -> None:
    assert Latency(**bench.summarise(rounds)) == summarise(rounds)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool"])
def test_inputs_are_of_the_kind_that_tersor_measures_with(dtype: str) -> None:
    spec = TensorSpec(name="x", dtype=dtype, shape=["batch", "tokens", 4])
    ours = random_batch(Signature(inputs=[spec], output=spec), 3).args[0].numpy()
    inputs = bench.make_inputs([{"name": "x", "dtype": dtype, "shape": list(ours.shape)}])["x"]
    assert (inputs.shape, inputs.dtype) == (ours.shape, ours.dtype)
    if dtype.startswith("float"):
        assert 0.7 < inputs.astype(float).std() < 1.3
        assert np.array_equal(inputs, bench.make_inputs([{"name": "x", "dtype": dtype, "shape": ours.shape}])["x"])
    else:
        assert np.array_equal(inputs, ours)


def test_a_changed_model_is_not_measured(kit: Path, machine: Machine) -> None:
    (kit / "results.json").unlink()
    file = next(kit.glob("models/*/model.bin"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = machine.python("bench.py", *QUICK, cwd=kit)
    assert done.returncode == 1
    assert "model.bin is not the file that was packed" in done.stderr
    file.unlink()
    done = machine.python("bench.py", *QUICK, cwd=kit)
    assert done.returncode == 1
    assert "model.bin is missing; copy the kit again" in done.stderr
    assert not (kit / "results.json").exists()


def test_a_model_that_cannot_be_loaded_ends_with_the_reason(kit: Path, machine: Machine) -> None:
    (kit / "results.json").unlink()
    content = json.loads((kit / "kit.json").read_text())
    member = content["artifacts"][0]
    (kit / member["folder"] / "model.onnx").write_bytes(b"no model")
    member["files"]["model.onnx"]["sha256"] = sha256(kit / member["folder"] / "model.onnx")
    (kit / "kit.json").write_text(json.dumps(content))
    done = machine.python("bench.py", *QUICK, cwd=kit)
    assert done.returncode == 1
    assert re.search(rf"the process that measured {member['name']} ended: .*(INVALID|Protobuf|protobuf)", done.stderr)
    assert not (kit / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "0"), "expected 1 to 1000"),
        (("--rounds", "many"), "invalid _count value"),
        (("--seconds", "nan"), "expected more than 0"),
        (("--out", "missing/results.json"), "is not a file in an existing folder"),
        (("--out", "models"), "is not a file in an existing folder"),
    ],
)
def test_options_are_checked_before_anything_is_measured(
    measured: Measured, machine: Machine, arguments: tuple[str, ...], message: str
) -> None:
    done = machine.python("bench.py", *arguments, cwd=measured.kit)
    assert done.returncode in {1, 2}
    assert message in done.stderr


# --- coming home


def test_numbers_come_into_every_document(run: Path, measured: Measured) -> None:
    artifact = run / "artifact"
    before, names = read_manifest(artifact), sorted(path.name for path in [*artifact.iterdir(), *run.iterdir()])
    found = import_results(measured.results, run)
    content = json.loads(measured.results.read_text())
    runtime = before.target.runtime
    (expected,) = [item for item in content["artifacts"].values() if item["runtime"] == runtime]
    (place,) = found.new
    assert found.known == []
    assert place.latency == Latency(**expected["latency"])
    assert place.runtime_version == f"{runtime} {content['machine']['versions'][runtime]}"
    assert (place.cores, place.threads, place.batch) == (os.cpu_count(), 1, 1)
    assert place.peak_memory_bytes == expected["peak_memory_bytes"]

    manifest = verify(artifact)
    same = {"report.json", "report.html", "README.md"} ^ set(manifest.files)
    assert {name: manifest.files[name] for name in same} == {name: before.files[name] for name in same}
    assert manifest.model_copy(update={"files": before.files}) == before
    assert sorted(path.name for path in [*artifact.iterdir(), *run.iterdir()]) == names

    report = Report.model_validate_json((artifact / "report.json").read_text())
    assert report.elsewhere == [place]
    page, card = (artifact / "report.html").read_text(), (artifact / "README.md").read_text()
    assert page == render_html(report)
    assert "Measured elsewhere" in page
    assert place.runtime_version in page
    assert "Measured elsewhere" in card
    for name in ("report.json", "report.html"):
        assert sha256(artifact / name) in card
    tersor.load(run)(np.zeros((1, 1, 8, 8), np.float32))


def test_the_same_results_come_in_once(run: Path, measured: Measured, tmp_path: Path) -> None:
    first = import_results(measured.results, run / "artifact")
    sealed = (run / "artifact" / MANIFEST).read_bytes()
    again = import_results(measured.results, run)
    assert (again.new, again.known) == ([], first.new)
    assert (run / "artifact" / MANIFEST).read_bytes() == sealed
    later = changed(measured, tmp_path / "later.json", lambda content: content.update(date="2031-01-01T00:00:00+00:00"))
    assert len(import_results(later, run).new) == 1
    report = Report.model_validate_json((run / "artifact" / "report.json").read_text())
    assert [place.date for place in report.elsewhere] == [first.new[0].date, "2031-01-01T00:00:00+00:00"]
    verify(run / "artifact")


def test_documents_are_drawn_as_compress_draws_them(run: Path, tmp_path: Path) -> None:
    artifact = run / "artifact"
    manifest = read_manifest(artifact)
    hashes = {name: entry.sha256 for name, entry in manifest.files.items() if name != "README.md"}
    report = Report.model_validate_json((artifact / "report.json").read_text())
    (tmp_path / "drawn").mkdir()
    draw(report, tmp_path / "drawn", manifest=manifest, hashes=hashes)
    for name in ("report.json", "report.html", "README.md"):
        assert (tmp_path / "drawn" / name).read_bytes() == (artifact / name).read_bytes()


def test_attached_and_foreign_files_stay(run: Path, measured: Measured) -> None:
    (run / "artifact" / "notes.txt").write_text("mine")
    (run / "artifact" / "tokenizer").mkdir()
    (run / "artifact" / "tokenizer" / "README.md").write_text("mine too")
    import_results(measured.results, run)
    assert (run / "artifact" / "notes.txt").read_text() == "mine"
    assert (run / "artifact" / "tokenizer" / "README.md").read_text() == "mine too"
    assert "notes.txt" not in verify(run / "artifact").files


def test_an_artifact_behind_a_link_stays_behind_it(run: Path, measured: Measured, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(run / "artifact", target_is_directory=True)
    import_results(measured.results, link)
    assert link.is_symlink()
    assert verify(link) == verify(run / "artifact")


def test_a_full_disk_leaves_the_artifact_as_it_was(
    compressed: Any, measured: Measured, small_disk: Callable[..., Path]
) -> None:
    shared = compressed("onnxruntime").artifact
    size = sum(path.stat().st_size for path in shared.iterdir()) // 1000
    place = small_disk(size * 3 // 2)
    artifact = Path(shutil.copytree(shared, place / "artifact"))
    with pytest.raises(OutputDirectoryError, match="Free space"):
        import_results(measured.results, artifact)
    assert verify(artifact) == verify(shared)
    assert [path.name for path in place.iterdir()] == ["artifact"]


def test_foreign_results_are_refused(run: Path, measured: Measured, tmp_path: Path) -> None:
    def other(content: dict[str, Any]) -> None:
        for found in content["artifacts"].values():
            found["files"] = {name: value[::-1] for name, value in found["files"].items()}

    sealed = (run / "artifact" / MANIFEST).read_bytes()
    for change in (other, lambda content: content.update(artifacts={})):
        results = changed(measured, tmp_path / "foreign.json", change)
        with pytest.raises(IntegrityError, match="has no numbers of") as caught:
            import_results(results, run)
        assert str(run) in str(caught.value)
    assert (run / "artifact" / MANIFEST).read_bytes() == sealed


def test_a_changed_artifact_takes_no_numbers(run: Path, measured: Measured) -> None:
    with (run / "artifact" / "report.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(IntegrityError, match="truncated or changed"):
        import_results(measured.results, run)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"schema_version": "1"}', b"9" * 5000, b"{}"],
)
def test_damaged_results_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="truncated or no results"):
        read_results(tmp_path / "results.json")


def test_results_that_are_no_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing.json", tmp_path / "pipe"):
        with pytest.raises(IntegrityError, match="is not a file"):
            read_results(path)
    with (tmp_path / "large.json").open("wb") as stream:
        stream.truncate(10**9)
    with pytest.raises(IntegrityError, match="far smaller"):
        read_results(tmp_path / "large.json")


def set_first(*path: str, to: object) -> Callable[[dict[str, Any]], None]:
    """Changes something of the first model."""

    def change(content: dict[str, Any]) -> None:
        place = next(iter(content["artifacts"].values()))
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema_version=2), "schema version 2, this tersor reads 1: upgrade"),
        (lambda content: content.update(schema_version=1.0), "schema_version"),
        (lambda content: content.update(surprise=1), "surprise"),
        (lambda content: content.pop("machine"), "machine"),
        (lambda content: content.update(date="yesterday"), "date"),
        (lambda content: content.update(kit="../../etc/passwd"), "kit"),
        (lambda content: content["machine"].update(cpu="x" * 1000), "cpu"),
        (lambda content: content["machine"].update(versions={}), "versions"),
        (lambda content: content.update(rounds=3), "expected 3"),
        (set_first("files", to={"model.onnx": "0" * 63}), "files"),
        (set_first("threads", to="4"), "threads"),
        (set_first("threads", to=True), "threads"),
        (set_first("threads", to=10**4), "threads"),
        (set_first("peak_memory_bytes", to=10**30), "peak_memory_bytes"),
        (set_first("latency", "median", to=-1.0), "median"),
        (set_first("latency", "median", to=1e9), "must not exceed"),
        (set_first("latency", "p95", to=float("nan")), "finite"),
        (set_first("latency", "iqr", to=float("inf")), "finite"),
        (set_first("latency", "iqr", to=-0.1), "positive"),
        (set_first("latency", "n", to=1), "at least one call"),
        (set_first("latency", "rounds", to=[0.0, 1.0]), "positive"),
        (set_first("latency", "histogram", to=[1.0] * 200), "201 quantiles"),
        (set_first("latency", "histogram", to=[2.0] + [1.0] * 200), "never fall"),
        (set_first("choice", to={"skipped": 1}), "choice"),
    ],
)
def test_impossible_results_are_refused(
    measured: Measured, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(IntegrityError, match=re.escape(message)) as caught:
        read_results(changed(measured, tmp_path / "results.json", change))
    assert len(str(caught.value)) < 1000


def test_hostile_names_stay_text(run: Path, measured: Measured, tmp_path: Path) -> None:
    hostile = "</td><script>alert(1)</script> {{7*7}} | [x](http://a) \x1b[31m ../../../tmp/owned"

    def change(content: dict[str, Any]) -> None:
        content["machine"].update(cpu=hostile, system=hostile, machine=hostile)
        content["artifacts"] = {f"{hostile} {name}": value for name, value in content["artifacts"].items()}

    before = {path for path in tmp_path.rglob("*") if path != run / "artifact"}
    import_results(changed(measured, tmp_path / "hostile.json", change), run)
    page, card = (run / "artifact" / "report.html").read_text(), (run / "artifact" / "README.md").read_text()
    assert "<script" not in page
    assert re.search(r"(?<!\\)<script", card) is None
    assert "\x1b" not in page + card
    assert "{{7*7}}" in page
    assert "[x](http" not in card
    verify(run / "artifact")
    assert {path for path in tmp_path.rglob("*")} - before <= {run / "artifact", tmp_path / "hostile.json"}


def test_choices_come_back_with_their_time(measured: Measured) -> None:
    results = read_results(measured.results)
    (timed,) = [item for item in results.artifacts.values() if item.choice is not None]
    assert points_of(results) == [(CHOICE, timed.latency.median)]


def test_a_report_without_foreign_numbers_does_not_speak_of_them(compressed: Any) -> None:
    report = compressed("onnxruntime").report
    assert report.elsewhere == []
    assert "elsewhere" not in render_html(report)
    assert "elsewhere" not in render_card(report, files={})
