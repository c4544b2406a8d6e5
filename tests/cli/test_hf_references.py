"""`tersor compress --model hf:DIR --task hf:…`: from the command line to an artifact, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.commands import Command
from hf import tiny
from tersor.cli.loading import load_candidate
from tersor.core.artifact import verify
from tersor.core.surgery import Surgery
from tersor.prune import write_pruned


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `weights.safetensors` and three files of sentences."""
    found = tmp_path_factory.mktemp("place")
    tiny.save_encoder(found / "model", found / "weights.safetensors")
    for seed, (role, count) in enumerate({"train": 40, "certify": 120, "report": 30}.items()):
        tiny.write_sentences(found / f"{role}.tsv", count, labels=2, seed=seed)
    return found


def arguments(place: Path, out: Path, **changed: object) -> list[object]:
    """Options of the run of this file, some of them changed, or left out where None."""
    files = ",".join(f"{role}={place / role}.tsv" for role in ("train", "certify", "report"))
    options = {"model": f"hf:{place / 'model'}", "weights": place / "weights.safetensors", "out": out,
               "task": f"hf:{files},max_length=24", "target": "onnxruntime", "recipe": "convert", "threads": 1,
               "rounds": 1, "max_drop": 0.1}  # fmt: skip
    chosen = {name: value for name, value in (options | changed).items() if value is not None}
    return ["compress", *(part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value))]


@pytest.mark.usefixtures("quick_latency")
def test_compress_takes_a_directory_and_files_of_sentences(command: Command, place: Path, tmp_path: Path) -> None:
    said = command(*arguments(place, tmp_path / "run"), "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert report["verdict"] == "certified"
    assert report["target"]["dynamic"] == {"input_ids": {"1": "tokens"}, "attention_mask": {"1": "tokens"}}
    manifest = verify(tmp_path / "run" / "artifact")
    assert [spec.shape for spec in manifest.signature.inputs] == [["batch", "tokens"]] * 2
    assert "tokenizer/tokenizer.json" in manifest.files


def test_a_dry_run_shows_inputs_and_splits(command: Command, place: Path, tmp_path: Path) -> None:
    said = command(*arguments(place, tmp_path / "run"), "--dry-run")
    assert said.code == 0, said.err
    plan = json.loads(said.out)
    assert plan["splits"] == {"train": 40, "calibrate": 40, "certify": 120, "report": 30}
    assert plan["inputs"]["input_ids"] == ["int64", "batch", "tokens"]
    assert plan["model"] == "MeanPooledClassifier"


def test_weights_may_be_a_pruned_model(place: Path, tmp_path: Path) -> None:
    reference, weights = f"hf:{place / 'model'}", place / "weights.safetensors"
    model = load_candidate(reference, weights).module
    write_pruned(tmp_path / "pruned", model, [Surgery(cuts=[])])
    found = load_candidate(reference, tmp_path / "pruned").module.state_dict()
    assert all((found[name] == value).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"model": "hf:nowhere"}, 2, "nowhere is not a directory"),
        ({"model": "hf:"}, 2, "expected hf:DIR"),
        ({"model": "hf:{place}"}, 2, "no config.json"),
        ({"weights": None}, 2, "plain encoder"),
        ({"weights": "nowhere.safetensors"}, 4, "does not exist"),
        ({"task": "hf:test=a.tsv"}, 2, "expected one of train"),
        ({"task": "hf:report=nowhere.tsv,max_length=24"}, 2, "cannot be read"),
        ({"task": "hf:report={place}/bad.tsv,max_length=24"}, 2, "line 2: expected a label in 0..1"),
        ({"model": "torch.nn:Identity", "weights": None}, 2, "needs a model hf:DIR"),
    ],
)
def test_what_is_wrong_is_said(
    command: Command, place: Path, tmp_path: Path, changed: dict[str, str | None], code: int, message: str
) -> None:
    (place / "bad.tsv").write_text("w1 w2\t1\nw3\t2\n")
    filled = {name: value if value is None else value.format(place=place) for name, value in changed.items()}
    said = command(*arguments(place, tmp_path / "run", **filled))
    assert said.code == code
    assert message in said.err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
