"""The artifact: loads anywhere, runs no code, and notices when anybody touched it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.core.artifact import MANIFEST, SCHEMA_VERSION, Manifest, describe_files, read_manifest, verify
from tersor.errors import ArtifactError, ConfigError, IntegrityError, RuntimeUnavailableError

RUNS = [("onnxruntime", "int8"), ("openvino", "int8"), ("eager", "convert")]
every_run = pytest.mark.parametrize(("runtime", "recipe"), RUNS, ids=[runtime for runtime, _ in RUNS])

# No torch, no tersor: what a stranger does with the manifest and the runtime alone.
PLAIN_ONNX = """
import json, pathlib, sys
import numpy as np, onnxruntime
artifact, images = pathlib.Path(sys.argv[1]), np.load(sys.argv[2])
manifest = json.loads((artifact / "manifest.json").read_text())
(spec,) = manifest["signature"]["inputs"]
assert spec["dtype"] == str(images.dtype)
assert [size for size in spec["shape"] if size != "batch"] == list(images.shape[1:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = manifest["target"]["threads"]
(model,) = [name for name in manifest["files"] if name.endswith(".onnx")]
session = onnxruntime.InferenceSession(str(artifact / model), options, providers=["CPUExecutionProvider"])
(output,) = session.run([manifest["signature"]["output"]["name"]], {spec["name"]: images})
assert not {"torch", "tersor"} & set(sys.modules)
np.save(sys.argv[3], output)
print([manifest["class_names"][index] for index in output.argmax(1)][0])
"""

LOAD = """
import importlib.util, pathlib, sys
import numpy as np, torch, tersor
problem, images, *artifacts = sys.argv[1:]
images = np.load(images)


def build():
    spec = importlib.util.spec_from_file_location("problem", problem)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build()


for number, directory in enumerate(artifacts):
    needs_code = (pathlib.Path(directory) / "model.safetensors").exists()
    session = tersor.load(directory, model=build if needs_code else None)
    assert needs_code or not isinstance(getattr(session, "module", None), torch.nn.Module)
    logits = session(images)
    assert isinstance(logits, np.ndarray)
    as_torch = session(torch.from_numpy(images))
    assert isinstance(as_torch, torch.Tensor)
    assert (as_torch.numpy() == logits).all()
    np.save(f"{number}.npy", logits)
"""


@pytest.fixture
def copied(deployed: Any, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(deployed("onnxruntime", "int8").artifact, tmp_path / "artifact"))


def reseal(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest as somebody would who knows how its digest is made."""
    content = json.loads((artifact / MANIFEST).read_text())
    del content["digest"]
    change(content)
    content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (artifact / MANIFEST).write_text(json.dumps(content))


def refused(artifact: Path, match: str) -> None:
    """Both ways in refuse it, and say which directory they talk about."""
    for enter in (verify, tersor.load):
        with pytest.raises(IntegrityError, match=match) as caught:
            enter(artifact)  # type: ignore[operator]
        assert str(artifact) in str(caught.value)


# --- loading


def test_it_loads_in_a_fresh_process_with_the_same_answers(
    deployed: Any, problem: Any, fresh_process: Any, tmp_path: Path
) -> None:
    images, labels = (tensor[:50].numpy() for tensor in problem.splits()["report"])
    np.save(tmp_path / "images.npy", images)
    artifacts = [deployed(runtime, recipe).artifact for runtime, recipe in RUNS]
    fresh_process(LOAD, problem.directory / "problem.py", tmp_path / "images.npy", *artifacts, cwd=tmp_path)
    for number, artifact in enumerate(artifacts):
        build = problem.module.build if RUNS[number][0] == "eager" else None
        here = tersor.load(artifact, model=build)(images)
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), here)
        assert here.shape == (50, 4)
        assert (here.argmax(1) == labels).mean() > 0.9


def test_onnx_needs_neither_tersor_nor_pytorch(deployed: Any, problem: Any, fresh_process: Any, tmp_path: Path) -> None:
    artifact = deployed("onnxruntime", "int8").artifact
    images = problem.splits()["report"][0][:7].numpy()
    np.save(tmp_path / "images.npy", images)
    done = fresh_process(PLAIN_ONNX, artifact, tmp_path / "images.npy", tmp_path / "logits.npy", cwd=tmp_path)
    here = tersor.load(artifact)(images)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), here)
    assert done.stdout.strip() == "abcd"[int(here[0].argmax())]


@every_run
@pytest.mark.parametrize("size", [1, 7])
def test_any_batch_size_gives_the_same_answers(
    deployed: Any, problem: Any, runtime: str, recipe: str, size: int
) -> None:
    session = tersor.load(
        deployed(runtime, recipe).artifact, model=problem.module.build if runtime == "eager" else None
    )
    images = problem.splits()["report"][0][:7]
    together = session(images)
    parts = torch.cat([session(part) for part in images.split(size)])
    torch.testing.assert_close(parts, together, rtol=1e-4, atol=1e-4)


def test_a_run_directory_loads_too_and_threads_can_be_chosen(deployed: Any, problem: Any) -> None:
    artifact = deployed("onnxruntime", "int8").artifact
    session = tersor.load(artifact.parent, threads=2)
    assert session.session.get_session_options().intra_op_num_threads == 2  # type: ignore[attr-defined]
    images = problem.images()[0][:3].numpy()
    np.testing.assert_allclose(session(images), tersor.load(artifact)(images), rtol=1e-5)


def test_inputs_that_do_not_fit_are_named(deployed: Any, problem: Any) -> None:
    session = tersor.load(deployed("onnxruntime", "int8").artifact)
    images = problem.images()[0][:2]
    for args, kwargs in [((), {}), ((images, images), {}), ((), {"pictures": images}), ((images,), {"input": images})]:
        with pytest.raises(ConfigError, match=r"takes the inputs \['input'\]"):
            session(*args, **kwargs)


def test_earlier_results_are_not_overwritten_by_later_calls(deployed: Any, problem: Any) -> None:
    images = problem.images()[0]
    for runtime, recipe in RUNS[:2]:
        session = tersor.load(deployed(runtime, recipe).artifact)
        first = session(images[:4])
        kept = first.clone()
        session(images[4:8])
        assert torch.equal(first, kept)


def test_an_eager_artifact_needs_the_class(deployed: Any, problem: Any) -> None:
    artifact = deployed("eager", "convert").artifact
    with pytest.raises(ArtifactError, match=r"weights only; give the class: tersor.load\(directory, model=build\)"):
        tersor.load(artifact)
    with pytest.raises(ArtifactError, match=r"do not fit the module"):
        tersor.load(artifact, model=lambda: nn.Linear(2, 2))
    session = tersor.load(artifact, model=problem.module.build)
    images = problem.images()[0][:5]
    with torch.no_grad():
        torch.testing.assert_close(session(images), problem.net(images), rtol=1e-5, atol=1e-5)


def test_a_runtime_that_is_not_installed_is_named_with_its_extra(
    deployed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = deployed("openvino", "int8").artifact
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'tersor\[openvino\]'"):
        tersor.load(artifact)
    assert verify(artifact).target.runtime == "openvino"  # checking it needs no runtime


# --- the manifest


@every_run
def test_the_manifest_lists_every_file_with_its_hash(deployed: Any, runtime: str, recipe: str) -> None:
    artifact = deployed(runtime, recipe).artifact
    manifest = read_manifest(artifact)
    assert set(manifest.files) == {path.name for path in artifact.iterdir()} - {MANIFEST}
    for name, entry in manifest.files.items():
        content = (artifact / name).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.schema_version == 1
    assert manifest.recipe["name"] == recipe
    assert manifest.target.runtime == runtime
    assert manifest.class_names == ["a", "b", "c", "d"]
    assert manifest.preprocessing == "noise over a pattern"
    assert manifest.versions["tersor"] == tersor.__version__
    assert manifest.precision == ("int8" if recipe == "int8" else "float32")
    assert manifest.signature.inputs[0].shape == ["batch", 1, 8, 8]
    assert manifest.signature.output.shape == ["batch", 4]
    assert (manifest.weight_bits in (7, 8)) == (recipe == "int8")


def test_nothing_in_an_artifact_can_be_code(deployed: Any) -> None:
    kinds = {path.suffix for runtime, recipe in RUNS for path in deployed(runtime, recipe).artifact.iterdir()}
    assert kinds <= {".json", ".md", ".html", ".onnx", ".xml", ".bin", ".safetensors"}


# --- tampering


FILES = ["README.md", "model.onnx", "quantization.json", "report.html", "report.json", MANIFEST]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first byte", "middle", "last byte"])
def test_one_flipped_bit_is_noticed(copied: Path, name: str, where: float) -> None:
    file = copied / name
    content = bytearray(file.read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    if name == MANIFEST and where == 1.0:
        content[-2] ^= 1  # the very last byte is a line end, which means nothing
    file.write_bytes(content)
    refused(copied, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99], ids=["nothing left", "half", "almost all"])
def test_truncation_is_noticed(copied: Path, name: str, kept: float) -> None:
    file = copied / name
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    refused(copied, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(copied: Path, name: str) -> None:
    (copied / name).unlink()
    refused(copied, "missing" if name != MANIFEST else "not an artifact: it has no manifest.json")


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_directory_or_link_in_place_of_a_file_is_noticed(copied: Path, tmp_path: Path, name: str) -> None:
    moved = tmp_path / "outside"
    (copied / name).rename(moved)
    (copied / name).mkdir()
    refused(copied, "missing")
    (copied / name).rmdir()
    (copied / name).symlink_to(moved)
    refused(copied, "outside the artifact")


def test_an_edited_manifest_is_noticed(copied: Path) -> None:
    file = copied / MANIFEST
    text = file.read_text()
    for before, after in [('"threads": 1', '"threads": 2'), ('"name": "Sequential"', '"name": "Better"'),
                          ('"seed": 0', '"seed": 1'), ("noise over", "noise under")]:  # fmt: skip
        assert before in text
        file.write_text(text.replace(before, after))
        refused(copied, "changed after it was written")
    file.write_text(text)
    verify(copied)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "{}", '{"digest": "x"}', '{"digest": "x", "schema_version": null}',
     '{"digest": "x", "schema_version": "1"}', '{"digest": "x", "schema_version": [1]}', "\x00\x01", "[" * 100_000],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(copied: Path, text: str) -> None:
    (copied / MANIFEST).write_text(text)
    refused(copied, MANIFEST)


def test_binary_rubbish_is_no_manifest(copied: Path) -> None:
    (copied / MANIFEST).write_bytes(bytes(range(256)))
    refused(copied, MANIFEST)


def test_a_newer_schema_says_upgrade(copied: Path) -> None:
    reseal(copied, lambda content: content.update(schema_version=SCHEMA_VERSION + 1))
    refused(copied, "schema version 3.*upgrade tersor")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(extra=1),
        lambda content: content.pop("signature"),
        lambda content: content["target"].update(threads=0),
        lambda content: content["target"].update(threads="1"),
        lambda content: content["files"]["model.onnx"].pop("sha256"),
        lambda content: content.update(files=[]),
    ],
)
def test_a_manifest_of_wrong_content_is_refused(copied: Path, change: Callable[[dict[str, Any]], None]) -> None:
    reseal(copied, change)
    refused(copied, "not a valid manifest")


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/hostname", "..\\secret", "./../secret", ".."])
def test_names_that_lead_outside_are_refused(copied: Path, name: str) -> None:
    secret = copied.parent / "secret"
    secret.write_text("secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size_bytes": 6}
    reseal(copied, lambda content: content["files"].update({name: entry}))
    refused(copied, "outside the artifact")


def test_a_directory_that_is_a_link_leads_outside_too(copied: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (copied / "inside").symlink_to(outside)
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size_bytes": 6}
    reseal(copied, lambda content: content["files"].update({"inside/secret": entry}))
    refused(copied, "outside the artifact")


def test_files_in_real_directories_are_fine(copied: Path) -> None:
    (copied / "inside").mkdir()
    (copied / "inside" / "more.txt").write_text("more")
    entries = {name: entry.model_dump() for name, entry in describe_files(copied).items()}
    reseal(copied, lambda content: content.update(files=entries))
    assert "inside/more.txt" in verify(copied).files


def test_an_artifact_behind_a_link_is_fine(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copied, target_is_directory=True)
    assert verify(tmp_path / "link").name == "Sequential"


def test_a_place_without_an_artifact_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not an artifact")
    refused(tmp_path, "not an artifact")


def test_a_sealed_manifest_reads_back(copied: Path) -> None:
    manifest = read_manifest(copied)
    manifest.write(copied)
    assert read_manifest(copied) == manifest
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.usefixtures("quick_latency")
def test_a_finished_run_whose_artifact_was_damaged_is_not_returned(problem: Any, tmp_path: Path) -> None:
    def run() -> tersor.Result:
        return tersor.compress(
            problem.model(), problem.task(), out=tmp_path / "run", budget=tersor.Budget(max_drop=0.02, rounds=1),
            target=tersor.Target("eager", threads=1), recipe="convert",
        )  # fmt: skip

    file = run().artifact / "report.json"
    file.write_text(file.read_text().replace('"certified": true', '"certified": 1   '))
    with pytest.raises(IntegrityError, match=r"report.json was changed"):
        run()
