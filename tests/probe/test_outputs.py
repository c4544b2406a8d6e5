from __future__ import annotations

import gc
import shutil
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ConfigError, ModelError, OutputError
from tersor.probe.outputs import Outputs, module_paths
from zoo import CNN_DATA, Cnn, normal, seeded


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.relu(self.a(x)))


class Net(nn.Module):
    """Two blocks in a sequence, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Inner(), Inner())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Several(nn.Module):
    """Parts that return tuples and mappings and take several tensors; one is never called, one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.split = Split()
        self.joined = Joined()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.twice = nn.Linear(6, 6)
        self.alias = self.twice

    def forward(self, *, x: Tensor) -> Tensor:
        self.lstm(x)
        parts = self.split(x)
        y = self.joined(parts["left"], right=parts["right"])
        y = self.attention(y, y, y)[0]
        return self.twice(torch.relu(self.alias(y)))


class Split(nn.Module):
    def forward(self, x: Tensor) -> OrderedDict[str, Any]:
        return OrderedDict(left=x + 1, right=x * 2, many=(x, None, x + 3))


class Joined(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right


X, TOKENS = normal(4, 6), normal(2, 3, 6)
COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "wrapper": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item]
    "method": lambda model: (model.compile(backend="eager"), model)[1],
}
# PyTorch's compiler reads `.grad` of tensors on the graph and hides the warning, but not where warnings are errors.
HIDDEN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def forwards(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if "forward" in module.__dict__]


def captured(model: nn.Module, address: str, *args: Any, **kwargs: Any) -> Tensor:
    with Outputs(model, [address]) as outputs:
        model(*args, **kwargs)
        (found,) = outputs.take().values()
    return found


def test_features_are_what_the_modules_return(noticed: Callable[[nn.Module], str]) -> None:
    model = seeded(Net)
    before = noticed(model)
    with Outputs(model, ["layers.0", "layers", "head", "head:input", "", ":input"]) as outputs:
        answer = model(X)
        features = outputs.take()
    assert noticed(model) == before
    assert forwards(model) == []
    first = model.layers[0](X)
    expected = {
        "layers.0": first, "layers": model.layers(X), "head": answer, "head:input": model.layers(X), "": answer,
        ":input": X,
    }  # fmt: skip
    assert list(features) == list(expected)
    assert all(torch.equal(features[address], value) for address, value in expected.items())


def test_gradients_flow_for_the_student_and_stop_for_the_teacher() -> None:
    model = seeded(Net)
    with Outputs(model, ["layers.0"]) as outputs:
        model(X)
        outputs.take()["layers.0"].square().sum().backward()
    weight = model.get_parameter("layers.0.a.weight")
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0
    assert model.head.weight.grad is None
    with Outputs(model, ["layers.0"], detach=True) as outputs:
        model(X)
        assert not outputs.take()["layers.0"].requires_grad


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*", ["layers.0", "layers.1"]),
        ("layers.?", ["layers.0", "layers.1"]),
        ("layers.**", ["layers.0", "layers.0.a", "layers.0.b", "layers.1", "layers.1.a", "layers.1.b"]),
        ("**.a", ["layers.0.a", "layers.1.a"]),
        ("*.a", []),
        ("*", ["", "layers", "head"]),
        ("layers.*:input", ["layers.0:input", "layers.1:input"]),
    ],
)
def test_patterns_stop_at_dots_unless_doubled(pattern: str, expected: list[str]) -> None:
    model = seeded(Net)
    if not expected:
        with pytest.raises(ConfigError, match="no module that can be called matches"):
            Outputs(model, [pattern])
        return
    outputs = Outputs(model, [pattern])
    assert list(outputs.addresses) == expected
    with outputs:
        model(X)
        assert list(outputs.take()) == expected


def test_patterns_mean_modules_that_can_be_called_and_each_once() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert Outputs(encoder, ["*"]).addresses == ("",)  # `layers` is a ModuleList
    assert Outputs(encoder, ["layers.*", "layers.0"]).addresses == ("layers.0", "layers.1")
    assert Outputs(seeded(Several), ["*"]).addresses == ("", "lstm", "split", "joined", "attention", "twice")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("split[left]", TOKENS + 1),
        ("split[many][0]", TOKENS),
        ("split[many][-1]", TOKENS + 3),
        ("joined:input[0]", TOKENS + 1),
        ("joined:input[right]", TOKENS * 2),
        ("split:input", TOKENS),
        (":input", TOKENS),
        (":input[x]", TOKENS),
    ],
)
def test_indices_pick_from_what_a_module_returns_or_is_given(address: str, expected: Tensor) -> None:
    assert torch.equal(captured(seeded(Several), address, x=TOKENS), expected)


def test_states_of_an_lstm() -> None:
    model = seeded(Several)
    output, (hidden, cell) = model.lstm(TOKENS)
    assert torch.equal(captured(model, "lstm[0]", x=TOKENS), output)
    assert torch.equal(captured(model, "lstm[1][0]", x=TOKENS), hidden)
    assert torch.equal(captured(model, "lstm[1][1]", x=TOKENS), cell)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("lstm", r"'lstm' is a tuple of \(0: \[2, 3, 5\], 1: tuple\).*'lstm\[0\]'"),
        ("lstm[1]", r"tuple of \(0: \[1, 2, 5\].*'lstm\[1\]\[0\]'"),
        ("lstm[2]", r"\[2\] is not in a tuple of .*'lstm\[0\]'"),
        ("split", r"OrderedDict of \(left: \[2, 3, 6\], right: .*'split\[left\]'"),
        ("split[up]", r"\[up\] is not in a OrderedDict of \(left.*'split\[left\]'"),
        ("split[many][1]", "is a NoneType, expected a tensor"),
        ("joined:input", r"\(0: \[2, 3, 6\], right: \[2, 3, 6\]\).*'joined:input\[0\]'"),
        ("twice[0]", r"one tensor already; leave \[0\] out"),
    ],
)
def test_what_is_not_one_tensor_is_refused_with_its_parts(address: str, message: str) -> None:
    model = seeded(Several)
    with pytest.raises(OutputError, match=message):
        captured(model, address, x=TOKENS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert forwards(model) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("layer", "the model has no module 'layer'; nearest: 'layers'"),
        ("layers.2", "nearest: 'layers.[01]"),
        ("zzzz", "there are 'layers', 'layers.0', .*'head'"),
        ("blocks.*", "no module that can be called matches 'blocks.*'"),
        ("layers[", "cannot read the address"),
        ("layers:output", "cannot read the address"),
        ("layers[0].a", "cannot read the address"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_with_the_nearest(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Outputs(seeded(Net), [address])


def test_a_string_is_not_a_list_of_addresses() -> None:
    with pytest.raises(ConfigError, match=r"write \['head'\]"):
        Outputs(seeded(Net), "head")


def test_a_module_that_does_not_run_is_named() -> None:
    model = seeded(Several)
    with Outputs(model, ["attention.out_proj", "lstm[0]"]) as outputs:
        model(x=TOKENS)
        with pytest.raises(ModelError, match=r"nothing was captured at 'attention.out_proj': the model did not call"):
            outputs.take()
        with pytest.raises(ModelError, match="did not run since the outputs were attached or last taken"):
            outputs.take()
    with pytest.raises(ModelError, match="run the model and call take\\(\\) inside `with`"):
        outputs.take()


def test_the_last_call_counts_and_all_are_there() -> None:
    model = seeded(Several)
    with Outputs(model, ["twice", "alias", "split[left]"]) as outputs:
        answer = model(x=TOKENS)
        calls = outputs.take_calls()
        assert {address: len(found) for address, found in calls.items()} == {"twice": 2, "alias": 2, "split[left]": 1}
        assert torch.equal(calls["twice"][1], answer)
        assert torch.equal(model.twice(torch.relu(calls["alias"][0])), answer)
        outputs.clear()
        answer = model(x=TOKENS + 1)
        assert torch.equal(outputs.take()["twice"], answer)


def test_a_tensor_that_is_overwritten_is_not_handed_out() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    with Outputs(model, ["0"]) as outputs:
        model(X)
        with pytest.raises(ModelError, match="'0' was overwritten after it was captured, by an operation in place"):
            outputs.take()
    assert bool((captured(model, "1", X) >= 0).all())
    with torch.inference_mode(), Outputs(model, ["1"]) as outputs:
        model(X)
        assert outputs.take()["1"].shape == (4, 6)


def test_nothing_stays_when_the_model_raises(noticed: Callable[[nn.Module], str]) -> None:
    model = seeded(Net)
    before = noticed(model)
    outputs = Outputs(model, ["layers.0", "head:input"])
    with pytest.raises(RuntimeError), outputs:
        model(normal(4, 7))
    with pytest.raises(ZeroDivisionError), outputs:
        1 / (model(X) is None)
    assert noticed(model) == before
    assert forwards(model) == []
    with outputs:
        model(X)
        assert len(outputs.take()) == 2


@pytest.mark.parametrize("end", ["take", "clear", "exit", "raise"])
def test_tensors_are_released(end: str) -> None:
    model = seeded(Net)
    outputs = Outputs(model, ["layers.0"])
    alive: list[weakref.ref[Tensor]] = []
    model.layers[0].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    with outputs:
        model(X)
        gc.collect()
        assert alive[0]() is not None
        if end in {"take", "clear"}:
            getattr(outputs, end)()
            gc.collect()
            assert alive[0]() is None
        if end == "raise":
            with pytest.raises(RuntimeError):
                model(normal(4, 7))
    gc.collect()
    assert alive[0]() is None


def test_a_model_is_released_with_its_outputs() -> None:
    model = seeded(Net)
    captured(model, "head", X)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_two_on_one_model_and_one_inside_itself(noticed: Callable[[nn.Module], str]) -> None:
    model = seeded(Net)
    before = noticed(model)
    outer, inner = Outputs(model, ["layers.0", "head"]), Outputs(model, ["layers.0"], detach=True)
    with outer:
        with inner:
            model(X)
            assert not inner.take()["layers.0"].requires_grad
        assert outer.take()["layers.0"].requires_grad
        with outer:
            model(X)
        assert len(outer.take()) == 2  # the inner end did not detach
    inner.__enter__()
    with outer:
        inner.__exit__(None, None, None)  # not in the order of a stack
        model(X)
        assert len(outer.take()) == 2
    assert noticed(model) == before
    assert forwards(model) == []


def test_an_own_forward_of_an_instance_survives() -> None:
    model = seeded(Net)
    plain = model.head.forward
    model.head.forward = lambda x: 2 * plain(x)
    own = model.head.forward
    assert torch.equal(captured(model, "head", X), 2 * plain(model.layers(X)))
    assert model.head.forward is own


def test_hooks_of_others_come_first() -> None:
    model = seeded(Net)
    handle = model.head.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(captured(model, "head", X), model(X))
    handle.remove()


@HIDDEN
@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("first", [False, True], ids=["tapped first", "called first"])
@pytest.mark.parametrize("address", ["layers", "layers.1.a", "head:input", ""])
def test_compiled_models_are_tapped(how: str, first: bool, address: str) -> None:
    model = seeded(Net)
    expected = captured(model, address, X)
    compiled = COMPILED[how](model)
    if first:
        compiled(X)
    outputs = Outputs(compiled, [address])
    for _ in range(3):
        with outputs:
            compiled(X)
            (found,) = outputs.take().values()
            assert torch.allclose(found, expected)
            assert found.requires_grad
        compiled(X)
    assert forwards(model) == []
    assert torch.allclose(captured(compiled, address, X), expected)


@HIDDEN
def test_a_compiled_model_compiles_once_for_its_taps() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    model = seeded(Net)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    compiled(X)
    outputs = Outputs(compiled, ["layers.*", "head:input"])
    for _ in range(10):
        with outputs:
            compiled(X)
            assert len(outputs.take()) == 3
        compiled(X)
    assert len(graphs) == 2
    with outputs:
        for _ in range(10):
            compiled(X)
            outputs.take()
        assert len(graphs) == 2
        compiled(X)
        compiled(X)
        assert {len(calls) for calls in outputs.take_calls().values()} == {2}


def test_errors_pass_through_a_compiled_model() -> None:
    compiled: Any = torch.compile(seeded(Several), backend="eager")
    compiled(x=TOKENS)
    with pytest.raises(OutputError, match=r"'split\[left\]'"):
        captured(compiled, "split", x=TOKENS)
    assert torch.equal(captured(compiled, "split[left]", x=TOKENS), TOKENS + 1)


def test_a_part_that_is_compiled_keeps_its_address() -> None:
    model = seeded(Net)
    expected = captured(model, "layers.1", X)
    model.layers = torch.compile(model.layers, backend="eager")  # type: ignore[assignment]
    assert "layers._orig_mod.1" in dict(model.named_modules())
    model(X)
    assert torch.allclose(captured(model, "layers.1", X), expected)


def test_parallel_wrappers_keep_the_addresses(tmp_path: Path) -> None:
    model = seeded(Net)
    expected = captured(model, "layers.1", X)
    assert list(module_paths(nn.DataParallel(model))) == list(module_paths(model))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(captured(wrapped, "layers.1", X), expected)
        with Outputs(wrapped, ["layers.1"]) as outputs:
            (wrapped(X).sum() + outputs.take()["layers.1"].square().sum()).backward()
        assert model.get_parameter("layers.1.a.weight").grad is not None
        compiled: Any = torch.compile(wrapped, backend="eager")
        compiled(X)
        assert torch.allclose(captured(compiled, "layers.1", X), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_called_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    assert list(module_paths(Holder())) == ["", "module"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    words, padding = normal(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        with pytest.raises(OutputError, match="use_nested_tensor = False"):
            captured(model, "layers.0", words, src_key_padding_mask=padding)
        model.use_nested_tensor = False
        assert captured(model, "layers.0", words, src_key_padding_mask=padding).shape == (2, 4, 8)


def test_the_fused_kernel_of_an_encoder_gives_way() -> None:
    model = seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    words = normal(2, 4, 8)
    with torch.no_grad():
        expected = model(words)
        assert torch.allclose(captured(model, "layers.1", words), expected, atol=1e-5)


def test_training_is_the_same_with_taps() -> None:
    def trained(tapped: bool) -> Tensor:
        model = seeded(Cnn).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outputs = Outputs(model, ["block", "head:input"] if tapped else [])
        for _ in range(3):
            optimizer.zero_grad()
            with outputs:
                loss = model(CNN_DATA).square().mean()
                assert len(outputs.take()) == 2 * tapped
            loss.backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(trained(True), trained(False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_inductor_is_tapped_with_gradients(how: str) -> None:
    model = seeded(Net)
    with Outputs(model, ["layers.0"]) as outputs:
        model(X)
        expected = outputs.take()["layers.0"]
        expected.square().sum().backward()
    weight = model.get_parameter("layers.0.a.weight")
    assert weight.grad is not None
    gradient, weight.grad = weight.grad, None
    compiled: Any = torch.compile(model) if how == "wrapper" else model
    if how == "method":
        model.compile()
    compiled(X)
    outputs = Outputs(compiled, ["layers.0"])
    for _ in range(2):
        weight.grad = None
        with outputs:
            compiled(X)
            found = outputs.take()["layers.0"]
        assert torch.allclose(found, expected, atol=1e-5)
        found.square().sum().backward()
        assert torch.allclose(weight.grad, gradient, atol=1e-5)  # type: ignore[arg-type]
    assert forwards(model) == []
