"""The zoo: every model loses half of its units and is proven right; what users do with it afterwards works.

Pruned once per session and kept; a fast core runs always, the rest is `slow`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from specimens import SPECIMENS, Specimen, transformers_specimens
from tersor.core.surgery import Surgery
from tersor.errors import CoverageError
from tersor.graph import apply_surgery
from tersor.graph.coupling.couple import named_outputs
from tersor.graph.coupling.integers import owners
from tersor.prune import PruneReport, structured

FAST = {
    *(f"constructs/{item.name}" for item in SPECIMENS["constructs"]),
    *(f"plain/{name}" for name in ("attention_block", "cross_attention", "lstm", "nanogpt_flash", "timm_vit")),
    *(f"convolutional/{name}" for name in ("resnet_a", "mobilenet_v3")),
    *(f"transformers/{name}" for name in ("bert_sdpa", "gpt2_eager", "llama_gqa_sdpa", "qwen2", "vit_sdpa")),
} - {"constructs/window_merging", "constructs/experts_weighed"}
REMEMBERS = {"constructs/remembered_length", "transformers/funnel"}  # every call leaves what fits its own sizes
NOTHING_GOES = {"constructs/made_inside"}  # their `forward` makes weights of fixed widths


def zoo() -> dict[str, Specimen | None]:
    """`group/name` -> specimen; None stands for what needs the library `transformers`."""
    groups: dict[str, list[Specimen]] = dict(SPECIMENS)
    if importlib.util.find_spec("transformers") is None:
        return {f"{group}/{item.name}": item for group, items in groups.items() for item in items} | {
            "transformers": None
        }
    groups["transformers"] = transformers_specimens()
    return {f"{group}/{item.name}": item for group, items in groups.items() for item in items}


ZOO = zoo()


def named(names: Any, *, slow: bool = False) -> list[Any]:
    """Parameters of a test; those outside the fast core, or all, are slow."""
    found = []
    for name in names:
        marks = [pytest.mark.slow] if slow or name not in FAST else []
        if ZOO[name] is None:
            marks.append(pytest.mark.skip(reason="needs the library transformers"))
        found.append(pytest.param(name, marks=marks, id=name))
    return found


PRUNABLE = [name for name in ZOO if name not in NOTHING_GOES]
every = pytest.mark.parametrize("name", named(PRUNABLE))
every_slowly = pytest.mark.parametrize("name", named(PRUNABLE, slow=True))


class Pruned(NamedTuple):
    """A specimen that was pruned, and what its model looked like to its owner before and after."""

    specimen: Specimen
    model: nn.Module
    report: PruneReport
    before: str
    after: str


@cache
def pruned(name: str) -> Pruned:
    """Half of the units gone."""
    specimen = ZOO[name]
    assert specimen is not None
    model = specimen.model()
    for variant in (0, 1):  # any call leaves something in some models: a cache, a flag
        answer(specimen, model, variant)
    before = appearance(model)
    with quiet():
        report = structured(model, [specimen.inputs(0), specimen.inputs(1)], amount=0.5, floor=0.0)
    return Pruned(specimen, model, report, before, appearance(model))


@contextmanager
def quiet() -> Iterator[None]:
    """Some models of the zoo warn about themselves at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def appearance(model: nn.Module) -> str:
    """All that the owner of a model could notice: weights, buffers, flags, classes, modes, attributes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(repr((name, id(tensor), tensor.dtype, tuple(tensor.shape), tensor.requires_grad)).encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(repr((name, type(module), module.training, len(module._forward_hooks))).encode())
    for owner, attributes in owners(model):
        plain = {key: value for key, value in attributes.items() if type(value) in (int, float, str, bool, tuple, list)}
        kinds = {key: type(value).__name__ for key, value in attributes.items()}
        digest.update(repr((owner, sorted(plain.items()), sorted(kinds.items()))).encode())
    return digest.hexdigest()


def answer(specimen: Specimen, model: nn.Module, variant: int = 0) -> list[Tensor]:
    """The tensors of a model's answer; some draw random numbers."""
    with torch.no_grad(), quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return named_outputs(specimen.call(model, variant))


def body(model: nn.Module) -> int:
    """Parameters outside embeddings and the output head (a head: what is called so, or tied to an embedding)."""
    apart = {
        id(parameter)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) or path.rpartition(".")[2] in ("head", "lm_head", "classifier")
        for parameter in module.parameters()
    }
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in apart)


def share_removed(name: str) -> float:
    """Of the parameters outside embeddings and head."""
    found = pruned(name)
    return 1 - body(found.report.model) / body(found.model)


def assert_same(left: list[Tensor], right: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape
        scale = float(b.double().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance * max(scale, 1e-12))


@every
def test_half_goes_and_is_proven_right(name: str) -> None:
    found = pruned(name)
    assert found.report.max_error is not None
    assert found.report.max_error <= 1e-4
    assert share_removed(name) >= found.specimen.least
    assert found.report.params_after < found.report.params_before


@pytest.mark.parametrize("name", named(name for name in PRUNABLE if name not in REMEMBERS))
def test_the_callers_model_is_untouched(name: str) -> None:
    found = pruned(name)
    assert found.after == found.before


@pytest.mark.parametrize("name", named(sorted(REMEMBERS & set(PRUNABLE))))
def test_a_model_that_remembers_its_last_call_answers_as_before(name: str) -> None:
    specimen = ZOO[name]
    assert specimen is not None
    model = specimen.model()
    weights = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    before = [answer(specimen, model, variant) for variant in (0, 1)]
    with quiet():
        structured(model, [specimen.inputs(0), specimen.inputs(1)], amount=0.5, floor=0.0)
    assert all(torch.equal(parameter, weights[path]) for path, parameter in model.named_parameters())
    for variant in (0, 1):
        assert_same(answer(specimen, model, variant), before[variant])


@every
def test_outputs_keep_their_shapes(name: str) -> None:
    found = pruned(name)
    for variant in (0, 1):
        before = answer(found.specimen, found.model, variant)
        after = answer(found.specimen, found.report.model, variant)
        assert [tensor.shape for tensor in after] == [tensor.shape for tensor in before]
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@every
def test_surgery_is_data_that_fits_a_fresh_model(name: str) -> None:
    found = pruned(name)
    assert Surgery.from_json(found.report.surgery.to_json()) == found.report.surgery
    replayed = apply_surgery(found.specimen.model(), found.report.surgery)
    assert_same(answer(found.specimen, replayed), answer(found.specimen, found.report.model))


@pytest.mark.parametrize("name", named(sorted(NOTHING_GOES)))
def test_where_nothing_can_go_the_reasons_are_told(name: str) -> None:
    specimen = ZOO[name]
    assert specimen is not None
    with pytest.raises(
        CoverageError, match=r"nothing of .* can be pruned: .*\[0\]: it meets a dimension that is fixed"
    ):
        structured(specimen.model(), [specimen.inputs(0), specimen.inputs(1)])


@pytest.mark.slow
def test_nine_of_ten_lose_forty_percent() -> None:
    shares = {name: share_removed(name) for name in PRUNABLE if ZOO[name] is not None}
    short = {name: round(share, 2) for name, share in shares.items() if share < 0.4}
    assert len(short) <= 0.1 * len(shares), short


@every_slowly
def test_gradients_flow(name: str) -> None:
    found = pruned(name)
    before = gradients(found.specimen, copy.deepcopy(found.model))
    after = gradients(found.specimen, copy.deepcopy(found.report.model))
    assert before
    assert before <= after


def gradients(specimen: Specimen, model: nn.Module) -> set[str]:
    """Names of parameters that got a gradient in training mode; all of them are finite."""
    model.train()
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        outputs = named_outputs(specimen.call(model))
        sum(out.square().mean() for out in outputs if out.requires_grad).backward()
    known = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in known.values())
    return set(known)


@every_slowly
def test_six_rounds_in_a_row(name: str) -> None:
    specimen = ZOO[name]
    assert specimen is not None
    model = specimen.model()
    shapes = [out.shape for out in answer(specimen, model)]
    sizes = [body(model)]
    for _ in range(6):
        try:
            with quiet():
                given = [specimen.inputs(0), specimen.inputs(1)]
                report = structured(model, given, amount=0.2, floor=0.0, verify="together")
        except CoverageError:
            break  # nothing is left to remove
        if not report.surgery.cuts:
            break  # a fifth of two heads is none
        assert report.max_error is not None
        assert report.max_error <= 1e-4
        model = report.model
        sizes.append(body(model))
    assert len(sizes) > 2
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.7 * sizes[0] or specimen.least < 0.3
    assert [out.shape for out in answer(specimen, model)] == shapes


REPLAY = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from specimens import SPECIMENS, transformers_specimens
from tersor.core.surgery import Surgery
from tersor.graph import apply_surgery
from tersor.graph.coupling.couple import named_outputs

folder, group = Path(sys.argv[1]), sys.argv[2]
items = {item.name: item for item in (transformers_specimens() if group == "transformers" else SPECIMENS[group])}
for name in json.loads((folder / "names.json").read_text()):
    model = items[name].model(seed=1)  # other weights: they come from the file
    apply_surgery(model, Surgery.from_json((folder / f"{name}.json").read_text()))
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    answers = []
    for variant in (0, 1):
        torch.manual_seed(0)
        with torch.no_grad():
            answers.append(named_outputs(items[name].call(model.eval(), variant)))
    torch.save(answers, folder / f"{name}.out")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "group",
    [
        *SPECIMENS,
        pytest.param(
            "transformers",
            marks=pytest.mark.skipif("transformers" in ZOO, reason="needs the library transformers"),
        ),
    ],
)
def test_surgery_replays_in_a_fresh_process(
    group: str, tmp_path: Path, fresh_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = [name.split("/")[1] for name in PRUNABLE if name.startswith(f"{group}/")]
    (tmp_path / "names.json").write_text(json.dumps(names))
    for name in names:
        report = pruned(f"{group}/{name}").report
        (tmp_path / f"{name}.json").write_text(report.surgery.to_json())
        torch.save(report.model.state_dict(), tmp_path / f"{name}.pt")
    fresh_process(REPLAY, tmp_path, group)
    for name in names:
        found = pruned(f"{group}/{name}")
        answers = torch.load(tmp_path / f"{name}.out", weights_only=True)
        for variant in (0, 1):
            assert_same(answers[variant], answer(found.specimen, found.report.model, variant), tolerance=1e-6)


@pytest.mark.parametrize("name", named((name for name in PRUNABLE if ZOO[name] is None or ZOO[name].export), slow=True))
def test_onnx_answers_the_same(name: str, tmp_path: Path) -> None:
    import onnxruntime

    found = pruned(name)
    given = found.specimen.inputs(0)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, None)
    wanted = answer(found.specimen, found.report.model)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(found.report.model, args, kwargs=kwargs, dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    tensors = [value for value in (given.values() if isinstance(given, dict) else given) if isinstance(value, Tensor)]
    feed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), tensors, strict=True)}
    answers = [torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]
    assert_same(answers[: len(wanted)], wanted, tolerance=1e-4)
