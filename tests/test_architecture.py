"""The rules of the house that no type checker and no linter holds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tersor"
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [path.relative_to(SOURCE).as_posix() for path in FILES]

# Packages that may be imported inside a function: whoever does not use them pays nothing for them.
OPTIONAL = {
    "matplotlib",
    "mlflow",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "sklearn",
    "tensorboard",
    "torchao",
    "transformers",
}
# The measuring process looks at its memory before PyTorch is there.
# A single process does not pay for what many need.
LATE = {"measure/worker.py": {"cloudpickle", "torch"}, "train/loop.py": {"tersor"}}

# Every file that implements a published method.
METHODS = sorted(
    {
        name
        for name in NAMES
        if name.startswith(("prune/criteria/", "distill/losses/", "quantize/ranges/", "quantize/rounding/"))
        and not name.endswith(("__init__.py", "/base.py"))
    }
    | {
        "core/quantization.py",
        "distill/ensemble.py",
        "distill/once_for_all.py",
        "distill/mutual.py",
        "distill/recover.py",
        "distill/sequences.py",
        "search/costs.py",
        "search/halving.py",
        "search/sampler.py",
        "distill/students/family.py",
        "distill/students/shallow.py",
        "distill/train.py",
        "measure/betting.py",
        "measure/certificate.py",
        "measure/changes.py",
        "measure/exact_paired.py",
        "prune/compensate.py",
        "prune/depth.py",
        "prune/gradual.py",
        "prune/lottery.py",
        "prune/reconstruction/least_squares.py",
        "prune/reconstruction/obc.py",
        "prune/reconstruction/sparsegpt.py",
        "prune/regularise.py",
        "prune/structured.py",
        "prune/unstructured.py",
        "quantize/allocation.py",
        "quantize/correct.py",
        "quantize/distilled_data.py",
        "quantize/dynamic.py",
        "quantize/equalize.py",
        "quantize/fallback.py",
        "quantize/formats/codebook.py",
        "quantize/formats/floats.py",
        "quantize/formats/kmeans.py",
        "quantize/formats/normal_float.py",
        "quantize/formats/powers.py",
        "quantize/formats/uniform.py",
        "quantize/half.py",
        "quantize/learned.py",
        "quantize/mixed.py",
        "quantize/qat.py",
        "quantize/reconstruct.py",
        "quantize/round_weights.py",
        "quantize/scale_columns.py",
        "quantize/sensitivity.py",
        "quantize/smooth.py",
        "quantize/static.py",
        "quantize/weight_only.py",
        "train/average.py",
        "train/schedule.py",
    }
)

MOST_ARGUMENTS = 7
# A command line has its options, a card its sections, a task its splits, a loop its callbacks: each is one flat list,
# nothing branches.
MORE_ARGUMENTS = {
    "cli/advise.py": {"advise_command"},
    "cli/distill.py": {"distill_command"},
    "cli/main.py": {"compress_command"},
    "cli/prune.py": {"prune_command"},
    "cli/quantize.py": {"quantize_command"},
    "core/task.py": {"__init__"},
    "distill/train.py": {"train"},
    "graph/attention.py": {"forward"},  # PyTorch's own signature
    "hf/text.py": {"text_task"},
    "measure/certificate.py": {"certify_metric"},
    "report/card.py": {"render_card"},
}


def tree_of(name: str) -> ast.Module:
    return ast.parse((SOURCE / name).read_text())


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def inner_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import that is inside a function; `tersor` for relative ones."""
    for function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.lineno, "tersor" if node.level else str(node.module).partition(".")[0]


def docstrings(tree: ast.Module) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 50
    assert len(METHODS) >= 15
    assert set(METHODS) <= set(NAMES)


def test_files_are_short() -> None:
    lengths = {name: len((SOURCE / name).read_text().splitlines()) for name in NAMES}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [name for name in NAMES if vague & set(Path(name).with_suffix("").parts)] == []


def test_imports_inside_functions_are_optional_packages() -> None:
    found = {
        f"{name}:{line} imports {package}"
        for name in NAMES
        for line, package in inner_imports(tree_of(name))
        if package not in OPTIONAL | LATE.get(name, set())
    }
    assert found == set()


def test_optional_packages_are_never_imported_at_the_top() -> None:
    found = set()
    for name in NAMES:
        for node in tree_of(name).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            heavy = {module.partition(".")[0] for module in modules} & OPTIONAL
            found |= {f"{name}:{node.lineno} imports {package}" for package in heavy}
    assert found == set()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_links_its_paper(name: str) -> None:
    text = docstrings(tree_of(name))
    assert "https://arxiv.org/abs/" in text or "https://doi.org/" in text


@pytest.mark.parametrize("package", ["prune/criteria", "distill/losses", "quantize/ranges"])
def test_one_method_is_one_file_with_its_name(package: str) -> None:
    exported = next(
        ast.literal_eval(node.value)
        for node in tree_of(f"{package}/__init__.py").body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    files = {Path(name).stem for name in NAMES if name.startswith(f"{package}/")} - {"__init__", "base"}
    assert exported == sorted(files)


def test_functions_take_few_arguments() -> None:
    found = set()
    for name in NAMES:
        for function in functions(tree_of(name)):
            given = function.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            count = sum(argument is not None and argument.arg not in {"self", "cls"} for argument in arguments)
            if count > MOST_ARGUMENTS and function.name not in MORE_ARGUMENTS.get(name, set()):
                found.add(f"{name}:{function.lineno} {function.name} takes {count}")
    assert found == set()


def test_no_argument_has_a_mutable_default() -> None:
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    found = {
        f"{name}:{function.lineno} {function.name}"
        for name in NAMES
        for function in functions(tree_of(name))
        for default in [*function.args.defaults, *function.args.kw_defaults]
        if isinstance(default, mutable)
    }
    assert found == set()


def test_the_layers_hold() -> None:
    pytest.importorskip("importlinter", reason="import-linter is a development dependency")
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_importing_tersor_is_light() -> None:
    heavy = {
        "IPython",
        "PIL",
        "matplotlib",
        "nncf",
        "onnxruntime",
        "onnxscript",
        "openvino",
        "pandas",
        "pytest",
        "sklearn",
        "torch._dynamo",
        "torch._inductor",
        "torch.onnx",
        "torchvision",
        "transformers",
        "typer",
    }
    program = (
        "import json, sys, warnings; warnings.simplefilter('error'); import tersor, torch; "
        "print(json.dumps({'modules': sorted(sys.modules), 'cuda': torch.cuda.is_initialized()}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert "tersor.pipeline.compress" in found["modules"]
    assert heavy & set(found["modules"]) == set()
    assert not found["cuda"]
