"""The model card: what a stranger needs in order to judge and to load the compressed model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tersor.core.report import Report
from tersor.report import pruning, search, units, wording

RUNTIME_FILES = {"onnxruntime": ".onnx", "openvino": ".xml"}
LABELS_SHOWN = 20
FAMILIES_SHOWN = 10
_LEADING = re.compile(r"^(\d+)([.)])(?!\S)|^([-+=])")


def render_card(
    report: Report,
    *,
    files: Mapping[str, str],
    inputs: Mapping[str, object] | None = None,
    outputs: Mapping[str, object] | None = None,
    preprocessing: Mapping[str, object] | None = None,
    labels: Sequence[str] | None = None,
    model_file: str | None = None,
    limits: Sequence[str] = (),
) -> str:
    """Renders the model card, a ``README.md``.

    All strings are untrusted: they are escaped for Markdown, and written as Python literals inside code.

    Args:
        report: The frozen record of a run.
        files: The SHA-256 of every file, by path relative to the card.
        inputs: What each input takes, by name, as in ``{"image": "float32 [batch, 3, 224, 224]"}``.
        outputs: What each output gives, by name.
        preprocessing: Settings that turn raw data into inputs, such as mean, std and size.
        labels: The names of the classes, in order.
        model_file: The file that the runtime loads; by default the first of `files` with its suffix.
        limits: Further sentences about what the model must not be relied on for.

    Returns:
        Markdown that ends with a newline.
    """
    certificate = report.certificate
    text = card_environment().get_template("card.md.j2").render(
        report=report,
        certificate=certificate,
        metric=wording.certified_metric(report),
        wording=wording,
        models=wording.models(report),
        files=sorted(files.items()),
        prunings=pruning.parts(report, drawn=False),
        proof=pruning.proof,
        searched=search.paragraph(report),
        families_shown=FAMILIES_SHOWN,
        inputs=inputs or {},
        outputs=outputs or {},
        preprocessing=preprocessing or {},
        labels=list(labels or []),
        labels_shown=LABELS_SHOWN,
        model_file=model_file or _model_file(report, files),
        input_names=list(inputs or {}),
        limits=limits,
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _model_file(report: Report, files: Mapping[str, str]) -> str | None:
    suffix = RUNTIME_FILES.get(report.deployed.runtime)
    return next((name for name in sorted(files) if suffix and name.endswith(suffix)), None)


@cache
def card_environment() -> Environment:
    """Jinja that escapes every value for Markdown."""
    environment = Environment(
        loader=PackageLoader("tersor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": units.byte_count,
        "count": units.count,
        "integer": units.integer,
        "ms": units.milliseconds,
        "rate": units.rate,
        "percent": units.percent,
        "metric_value": units.metric_value,
        "exact_difference": units.exact_difference,
        "capital": wording.capital,
        "literal": python_literal,
        "comment": python_comment,
    }
    return environment


def _finalize(value: object) -> Markup:
    """Every value is escaped for Markdown here, so that HTML escaping has nothing left to do."""
    if isinstance(value, Markup):
        return value
    return Markup(markdown(units.MISSING if value is None else value))  # noqa: S704 - escaped for Markdown


def markdown(value: object) -> str:
    """Text that Markdown shows as it is, also in a table cell: no markup, HTML, link, mention or formula."""
    line = units.one_line(value)
    line = re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", line)
    line = line.replace("$", "&#36;").replace("@", "&#64;").replace("://", r"\://").replace("www.", r"www\.")
    return _LEADING.sub(lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", line)


def python_literal(value: object) -> Markup:
    """A string as a Python literal for the code examples, in double quotes where that is simple."""
    text = str(value)
    simple = text.isprintable() and not set(text) & set("\\\"'")
    return Markup(f'"{text}"' if simple else repr(text))  # noqa: S704 - inside a code fence, on one line


def python_comment(value: object) -> Markup:
    """A description for the end of a code line."""
    return Markup(units.one_line(value, 80))  # noqa: S704 - inside a code fence, on one line
