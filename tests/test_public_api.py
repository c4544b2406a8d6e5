"""What the package shows: few names, each documented; errors as their docstring draws them."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from types import FunctionType

import pytest

import tersor
from tersor import errors
from tersor.core import artifact

SOURCE = Path(errors.__file__).parent
CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>\w+)(?:\((?P<others>[\w, ]+)\))?(?:\s{2,}(?P<meaning>\S.*))?$")


def drawn_tree() -> dict[str, tuple[str | None, set[str], str]]:
    """Of each class in the drawing: its parent, its other bases and what it means."""
    drawing = (errors.__doc__ or "").partition("::\n")[2]
    found: dict[str, tuple[str | None, set[str], str]] = {}
    above: list[tuple[int, str]] = []
    for line in drawing.splitlines():
        part = LINE.match(line)
        if part is None or not line.strip():
            assert not line.strip(), f"not part of the drawing: {line!r}"
            continue
        depth = len(part["indent"])
        while above and above[-1][0] >= depth:
            above.pop()
        others = {name.strip() for name in (part["others"] or "").split(",") if name.strip()}
        found[part["name"]] = (above[-1][1] if above else None, others, part["meaning"] or "")
        above.append((depth, part["name"]))
    return found


def raised_in_source() -> set[str]:
    """Names of the classes that some `raise` in the package makes."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                found.add(node.exc.func.id)
    return found


def test_the_names_are_few_and_sorted() -> None:
    assert tersor.__all__ == sorted(tersor.__all__)
    assert len(set(tersor.__all__)) == len(tersor.__all__) <= 20
    assert {"Budget", "Recipe", "Report", "Target", "Task", "TersorError", "compress", "load"} <= set(tersor.__all__)


@pytest.mark.parametrize("name", tersor.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(tersor, name)
    if name == "__version__":
        assert value == version("tersor")
        return
    text = value.__doc__ or ""  # own text: pydantic and dataclasses put in theirs where there is none
    assert len(text.split()) >= 5
    assert not text.startswith(f"{name}(")
    if inspect.isclass(value):
        assert value.__doc__ is not getattr(value.__base__, "__doc__", None)


def test_every_public_class_shows_documented_members() -> None:
    bare = []
    for name in tersor.__all__:
        value = getattr(tersor, name)
        members = vars(value).items() if inspect.isclass(value) else []
        for member, item in members:
            function = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
            if not member.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                bare.append(f"{name}.{member}")
    assert bare == []


def test_nothing_public_is_left_out_of_the_measure_package() -> None:
    measure = tersor.measure
    assert measure.__all__ == sorted(measure.__all__)
    assert [name for name in measure.__all__ if not (getattr(measure, name).__doc__ or "").strip()] == []


def test_the_drawing_shows_every_error() -> None:
    assert set(drawn_tree()) == set(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_drawing_tells_the_truth(name: str) -> None:
    parent, others, _ = drawn_tree()[name]
    bases = {base.__name__ for base in CLASSES[name].__bases__}
    if name == "TersorError":
        assert (parent, bases) == (None, {"Exception"})
        return
    assert bases == {parent, *others}
    assert all(hasattr(builtins, other) for other in others)
    assert issubclass(CLASSES[name], tersor.TersorError)
    assert CLASSES[name].__doc__


def test_the_drawing_says_what_each_error_is_about() -> None:
    assert [name for name, (parent, _, meaning) in drawn_tree().items() if parent and not meaning] == []


def test_no_error_is_dead() -> None:
    assert set(CLASSES) - {"TersorError"} <= raised_in_source()


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("ConfigError", ValueError), ("DataError", ValueError), ("OutputError", TypeError),
     ("RuntimeUnavailableError", ImportError), ("OutputDirectoryError", OSError)],
)  # fmt: skip
def test_errors_are_caught_by_the_usual_names_too(name: str, builtin: type[Exception]) -> None:
    error = CLASSES[name]("what, where and what to do")
    assert isinstance(error, builtin)
    assert str(error) == "what, where and what to do"


def natural(name: str) -> list[tuple[int, str]]:
    """Numbers count as numbers: 8 comes before 16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def test_the_rooms_that_are_shown_hold_what_is_promised() -> None:
    assert all(callable(getattr(tersor.prune, name)) for name in ("structured", "unstructured", "Structured"))
    assert all(callable(getattr(tersor.graph, name)) for name in ("couple", "apply_surgery"))
    assert all(callable(getattr(tersor.quantize, name)) for name in ("uniform", "codebook", "normal_float", "Static"))
    assert all(callable(getattr(tersor.distill, name)) for name in ("train", "mutual", "Ensemble", "Recover", "Term"))
    assert all(callable(getattr(tersor.train, name)) for name in ("fit", "supervised", "Schedule", "Checkpoints"))
    for room in (tersor.prune, tersor.graph, tersor.quantize, tersor.distill, tersor.train):
        assert room.__all__ == sorted(room.__all__, key=natural)
        public = [getattr(room, name) for name in room.__all__]  # a type alias has no text of its own
        assert [
            item for item in public if isinstance(item, type | FunctionType) and not (item.__doc__ or "").strip()
        ] == []


def test_the_manifest_is_no_longer_among_the_first_names() -> None:
    assert not hasattr(tersor, "Manifest")
    assert artifact.Manifest.__doc__
