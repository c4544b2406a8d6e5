"""Sentences become batches as the tokenizer alone would make them; every wrong line is named."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tersor import hf
from tersor.errors import ConfigError, DataError, OverlapError
from tersor.hf.reference import model_directory, parse_task
from tersor.hf.text import read_tsv


@pytest.fixture
def copied(classifier: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier.directory, tmp_path / "copied"))


def lines(place: Path, *content: str) -> Path:
    file = place / "some.tsv"
    file.write_text("".join(f"{line}\n" for line in content))
    return file


# --- batches


def test_batches_are_what_the_tokenizer_makes(classifier: Any, files: dict[str, Path]) -> None:
    task = hf.text_task(classifier.directory, **files, max_length=20)
    tokenizer = AutoTokenizer.from_pretrained(str(classifier.directory), local_files_only=True)
    sentences = read_tsv(files["report"])
    made = tokenizer(sentences.texts[5:9], padding=True, truncation=True, max_length=20, return_tensors="pt")
    batch = task.require("report", "a test").batch([5, 6, 7, 8])
    assert list(batch.kwargs) == ["input_ids", "attention_mask"]
    assert torch.equal(batch.kwargs["input_ids"], made["input_ids"])
    assert torch.equal(batch.kwargs["attention_mask"], made["attention_mask"])
    assert batch.labels is not None
    assert batch.labels.tolist() == sentences.labels[5:9]
    assert {batch.kwargs[name].dtype for name in batch.kwargs} == {torch.int64}


def test_each_batch_is_as_long_as_its_longest_sentence(classifier: Any, tmp_path: Path) -> None:
    file = lines(tmp_path, "w1\t0", "w1 w2 w3\t1", "w1 w2 w3 w4 w5 w6 w7 w8 w9\t2")
    split = hf.text_task(classifier.directory, report=file, max_length=8).require("report", "a test")
    lengths = [split.batch(positions).kwargs["input_ids"].shape[1] for positions in ([0], [0, 1], [0, 1, 2])]
    assert lengths == [3, 5, 8]
    assert split.batch([0, 2]).kwargs["attention_mask"].sum(1).tolist() == [3, 8]


def test_the_task_says_what_travels_along_and_how_inputs_are_made(classifier: Any, files: dict[str, Path]) -> None:
    task = hf.text_task(classifier.directory, report=files["report"], max_length=20)
    assert task.class_names == ("bad", "fair", "good")
    assert "20 tokens" in task.preprocessing
    assert set(task.attachments) == {
        f"tokenizer/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }
    assert all(path.parent == classifier.directory for path in task.attachments.values())


def test_a_plain_encoder_has_no_class_names(encoder: Any, files: dict[str, Path]) -> None:
    assert hf.text_task(encoder.directory, report=files["report"], max_length=40).class_names == ()


def test_what_is_measured_on_is_not_learned_from(
    classifier: Any, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured = files["certify"].read_text().splitlines()
    learned = tmp_path / "more.tsv"
    learned.write_text("\n".join([measured[3], "w1 w2 w3 w4\t0", measured[7]]))
    with caplog.at_level(logging.WARNING, "tersor"):
        task = hf.text_task(classifier.directory, train=learned, certify=files["certify"], max_length=40)
    assert len(task.require("train", "a test")) == 1
    assert len(task.require("certify", "a test")) == len(measured)
    assert "2 of 3 sentences of train" in caplog.text


def test_two_measuring_splits_may_not_share_a_sentence(classifier: Any, files: dict[str, Path]) -> None:
    with pytest.raises(OverlapError):
        hf.text_task(classifier.directory, certify=files["report"], report=files["report"], max_length=40)


# --- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\t0\ntwo\n", r"line 2: expected sentence<TAB>label, got 'two'"),
        (b"one\t0\n\ntwo\t1\n", "line 2: expected sentence"),
        (b"one\t0\ntwo\tmore\t1\n", "line 2: expected sentence"),
        (b"one\t0\n \t1\n", "line 2: expected sentence"),
        (b"sentence\tlabel\none\t0\n", "line 1: expected a label in 0, 1, .*got 'label'; files have no header"),
        (b"one\t0\ntwo\t-1\n", "line 2: expected a label"),
        (b"one\t1.0\n", "line 1: expected a label"),
        (b"", "line 1: expected sentence"),
        (b"one\t0\n\xff\t1\n", "not UTF-8"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.tsv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_tsv(file)
    assert str(file) in str(caught.value)


def test_windows_line_ends_byte_order_marks_and_odd_separators_inside(tmp_path: Path) -> None:
    file = tmp_path / "odd.tsv"
    file.write_bytes("\ufeffone\t0\r\ntwo\u2028three\x0bfour\t1\r\n".encode())
    found = read_tsv(file)
    assert found.texts == ["one", "two\u2028three\x0bfour"]
    assert found.labels == [0, 1]


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tsv cannot be read"):
        read_tsv(tmp_path / "none.tsv")
    with pytest.raises(DataError, match=r"expected a \.tsv file"):
        read_tsv(tmp_path / "some.csv")


def test_labels_beyond_the_models_are_named(classifier: Any, tmp_path: Path) -> None:
    file = lines(tmp_path, "w1\t2", "w2\t3")
    with pytest.raises(DataError, match=r"some\.tsv, line 2: expected a label in 0\.\.2, got '3'"):
        hf.text_task(classifier.directory, report=file, max_length=20)


# --- the tokenizer


def test_a_directory_without_tokenizer(copied: Path, files: dict[str, Path]) -> None:
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        hf.text_task(copied, report=files["report"])


def test_a_damaged_tokenizer(copied: Path, files: dict[str, Path]) -> None:
    (copied / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer in .* cannot be read"):
        hf.text_task(copied, report=files["report"])


@pytest.mark.parametrize("length", [0, 2, 41, 128])
def test_lengths_that_the_model_does_not_take(classifier: Any, files: dict[str, Path], length: int) -> None:
    with pytest.raises(ConfigError, match=f"takes 3 to 40 tokens, got {length}"):
        hf.text_task(classifier.directory, report=files["report"], max_length=length)


# --- references


def test_references_of_the_command_line(classifier: Any, files: dict[str, Path]) -> None:
    text = ",".join(f"{role}={file}" for role, file in files.items())
    task = parse_task(f"hf:{text}, max_length=20", classifier.directory)
    assert {role: len(split) for role, split in task.splits.items()} == {
        "train": 60, "certify": 120, "report": 40, "calibrate": 60,
    }  # fmt: skip
    assert "20 tokens" in task.preprocessing
    assert model_directory("hf:some/where") == Path("some/where")
    assert model_directory("package:build") is None


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf:", "expected hf:train=FILE"),
        ("hf:train", "expected hf:train=FILE"),
        ("hf:train=", "expected hf:train=FILE"),
        ("hf:test=a.tsv", "expected one of train, calibrate, search, certify, report or max_length, got 'test'"),
        ("hf:train=a.tsv,train=b.tsv", "train is given twice"),
        ("hf:train=a.tsv,max_length=long", "whole number, got 'long'"),
    ],
)
def test_references_that_are_wrong(reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_task(reference, Path("nowhere"))


def test_a_model_reference_without_directory() -> None:
    with pytest.raises(ConfigError, match="expected hf:DIR"):
        model_directory("hf:")
