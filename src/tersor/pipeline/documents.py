"""The documents of an artifact that say what was measured: `report.json`, `report.html` and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from tersor.core.artifact import Manifest
from tersor.core.files import sha256
from tersor.core.report import Report
from tersor.core.signature import TensorSpec
from tersor.errors import ConfigError, IntegrityError
from tersor.report import render_card, render_html

REPORT, PAGE, CARD = "report.json", "report.html", "README.md"
MODEL_FILES = ("model.onnx", "model.xml")


def read_report(artifact: Path) -> Report:
    """The report of an artifact whose files have been verified.

    Raises:
        IntegrityError: if it is missing, or not of the form that this version of tersor reads.
    """
    path = artifact / REPORT
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; the artifact is incomplete: copy it again")
    try:
        return Report.model_validate_json(path.read_bytes())
    except (ValidationError, ConfigError) as error:
        raise IntegrityError(
            f"{path} is not a report of this version of tersor ({str(error)[:300]}); upgrade tersor, or compress again"
        ) from None


def draw(report: Report, directory: Path, *, manifest: Manifest, hashes: Mapping[str, str]) -> None:
    """Writes all three into `directory`; `hashes` has the SHA-256 of every other file that the card shall list."""
    (directory / REPORT).write_text(report.model_dump_json(indent=2) + "\n")
    (directory / PAGE).write_text(render_html(report))
    files = {**hashes, REPORT: sha256(directory / REPORT), PAGE: sha256(directory / PAGE)}
    card = render_card(
        report,
        files=files,
        inputs={spec.name: _described(spec) for spec in manifest.signature.inputs},
        outputs={manifest.signature.output.name: _described(manifest.signature.output)},
        preprocessing={"inputs": manifest.preprocessing} if manifest.preprocessing else {},
        labels=manifest.class_names,
        model_file=next((name for name in MODEL_FILES if name in files), None),  # not an attached one
    )
    (directory / CARD).write_text(card)


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(str(size) for size in spec.shape)}]"
