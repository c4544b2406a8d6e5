"""Whole blocks: which are found, why others are not, what stands in their place, and what must fit before it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specimens import SPECIMENS
from tersor.core.surgery import Shrink, SkippedBlock, Surgery
from tersor.errors import SurgeryError
from tersor.graph import apply_surgery
from tersor.graph.blocks import Skip, bypassed, find_blocks
from tersor.graph.coupling import runs_of

ZOO = {item.name: item for items in SPECIMENS.values() for item in items}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """`x + f(x)`, answered in one of several forms."""

    def __init__(self, form: str = "tensor", width: int = 8) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 12), nn.Linear(12, width)
        self.form = form

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        answer = x + self.outer(self.inner(x).relu())
        weights = answer.softmax(-1)
        return {
            "tensor": answer,
            "tuple": (answer,),
            "list": [answer, mask],
            "weights": (answer, weights, mask),
        }[self.form]


class Plain(Residual):
    """The same without a way around."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.outer(self.inner(x).relu())


class Gated(Residual):
    """A gate is no way around: with weights of zero it passes half of its input."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x * self.outer(self.inner(x).relu()).sigmoid()


class Wider(Residual):
    """Another shape goes out."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return torch.cat([x, x + self.outer(self.inner(x).relu())], -1)


class Chain(nn.Module):
    """Blocks one after another."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        for block in self.blocks:
            answer = block(x, mask)
            x = answer[0] if isinstance(answer, tuple | list) else answer
        return x


def chain(*blocks: nn.Module) -> Chain:
    return Chain(*blocks).eval()


def found(model: nn.Module, example: Any = X, paths: list[str] | None = None) -> tuple[list[str], dict[str, str]]:
    torch.manual_seed(0)
    blocks, frozen = find_blocks(model.eval(), runs_of(example), paths)
    return [block.path for block in blocks], {item.name: item.reason for item in frozen}


# --- which blocks are found


@pytest.mark.parametrize("other", [Plain, Gated, Wider])
def test_a_block_has_a_way_around_its_weights(other: type[Residual]) -> None:
    model = nn.Sequential(Residual(), other(), nn.Linear(16 if other is Wider else 8, 2))
    assert found(model) == (["0"], {})


ARCHITECTURES = {
    "resnet_a": ["layers.0", "layers.1", "layers.3", "layers.5"],  # those between change the shape
    "mobilenet_v2": ["features.1", "features.3"],
    "convnext": ["stage1.0", "stage1.1", "stage2.0", "stage2.1"],
    "encoder_post_norm": ["encoder.layers.0", "encoder.layers.1"],
    "decoder": ["decoder.layers.0", "decoder.layers.1"],
    "timm_vit": ["blocks.0", "blocks.1"],
    "nanogpt": ["h.0", "h.1"],
    "densenet": [],
    "lstm": [],
    "unet": [],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_blocks_that_people_know(name: str, noticed: Callable[[nn.Module], str]) -> None:
    model = ZOO[name].model()
    before = noticed(model)
    blocks, frozen = find_blocks(model, runs_of(ZOO[name].inputs(0)))
    assert [block.path for block in blocks] == ARCHITECTURES[name]
    assert frozen == []
    assert noticed(model) == before


class Stage(nn.Module):
    """Blocks in a row: itself a way from a shape to the same shape."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_a_stage_gives_way_to_its_blocks() -> None:
    model = nn.Sequential(Stage(Residual(), Residual()), Stage(Residual(), Residual()))
    assert found(model)[0] == ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]


def test_a_wrapper_gives_way_to_the_one_block_that_it_holds() -> None:
    assert found(nn.Sequential(Stage(Residual()), Stage(Residual())))[0] == ["0.blocks.0", "1.blocks.0"]


class Encoder(nn.Module):
    """A transformer's block: a block with blocks of other kinds in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Residual(), Other()

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attention(x))


class Other(Residual):
    """Of another class."""


def test_of_blocks_inside_blocks_the_outer_ones_count() -> None:
    assert found(nn.Sequential(Encoder(), Encoder()))[0] == ["0", "1"]


def test_named_modules_are_taken_whatever_they_look_like() -> None:
    model = nn.Sequential(Residual(), Plain(), Wider(), nn.Linear(16, 2))
    assert found(model, paths=["1", "0"]) == (["0", "1"], {})  # in the model's order
    assert found(model, paths=["2", "1"]) == (["1"], {"2": "its output has not the shape of an input"})


@pytest.mark.parametrize("path", ["9", "", "0.inner.x"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(SurgeryError, match="blocks: the model has no modules"):
        found(nn.Sequential(Residual()), paths=[path])


class Moody(Residual):
    """Answers in another form to small batches."""

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        answer = x + self.outer(self.inner(x).relu())
        return answer if len(x) > 2 else (answer,)


class Sometimes(nn.Module):
    """The second block is for large batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom = Residual(), Residual()

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.seldom(x) if len(x) > 2 else x


def test_reasons_say_what_stands_in_the_way() -> None:
    both = [X, X[:2]]
    for paths in (None, ["blocks.0", "blocks.1"]):
        assert found(chain(Residual(), Moody()), both, paths) == (
            ["blocks.0"],
            {"blocks.1": "it answers in a different form from call to call"},
        )
    assert found(Sometimes(), X[:2], ["always", "seldom"]) == (
        ["always"],
        {"seldom": "it was not called in the example runs"},
    )
    assert found(Sometimes(), both)[0] == ["always", "seldom"]


class KeyCache(list[Any]):
    """Named as caches are."""


class Cached(Residual):
    """A layer with a number, that is given a cache."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if mask is not None:
            mask.append(self.layer_idx)
        return super().forward(x)


class Generator(nn.Module):
    """Gives its layers a cache if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cached(number) for number in range(3))

    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        cache = KeyCache() if use_cache else None
        for layer in self.layers:
            x = layer(x, cache)
        return x


@pytest.mark.parametrize("example", [{"x": X}, {"x": X, "use_cache": True}, {"x": X, "use_cache": False}])
def test_the_layer_that_a_cache_counts_by_stays_even_if_no_example_uses_one(example: dict[str, Any]) -> None:
    assert found(Generator(), example) == (
        ["layers.1", "layers.2"],
        {"layers.0": "the cache of keys and values takes its length from it"},
    )


# --- what stands in their place


@pytest.mark.parametrize(
    ("form", "sources", "kind"),
    [("tensor", (0,), Tensor), ("tuple", (0,), tuple), ("list", (0, 1), list), ("weights", (0, None, 1), tuple)],
)
def test_a_skip_answers_in_the_form_of_its_block(form: str, sources: tuple[Any, ...], kind: type) -> None:
    model, mask = chain(Residual(form), Residual(form)), torch.ones(3)
    blocks, _ = find_blocks(model, runs_of((X, mask)))
    assert [(block.path, block.sources) for block in blocks] == [("blocks.0", sources), ("blocks.1", sources)]
    skip = Skip(blocks[0])
    answer = skip(X, mask)
    assert type(answer) is kind
    parts = [answer] if form == "tensor" else list(answer)
    wanted: list[Any] = [{0: X, 1: mask, None: None}[source] for source in sources]
    assert all(part is want for part, want in zip(parts, wanted, strict=True))
    assert f"{blocks[0].form} of {list(sources)}" in repr(skip)


def test_a_skip_takes_keywords_and_misses_nothing_that_a_call_leaves_out() -> None:
    skip = Skip(SkippedBlock(path="b", form="tuple", sources=("hidden", "mask", 1)))
    assert skip(hidden=X) == (X, None, None)
    first, mask, second = skip(None, 7, hidden=X, mask=5)
    assert (first is X, mask, second) == (True, 5, 7)


class Numbered(Residual):
    """With attributes that parents ask for."""

    kind = "full"

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx, self.sizes, self.table = 3, (1, 2), torch.ones(2)

    @property
    def computed(self) -> int:
        return self.inner.out_features


def test_plain_attributes_stay_readable_and_nothing_else() -> None:
    model = chain(Numbered(), Residual()).train()
    apply_surgery(model, Surgery(skipped=(SkippedBlock(path="blocks.0"),)))
    skip: Any = model.blocks[0]
    assert isinstance(skip, Skip)
    assert (skip.layer_idx, skip.sizes, skip.kind, skip.training) == (3, (1, 2), "full", True)
    assert not any(hasattr(skip, name) for name in ("table", "inner", "computed"))
    assert list(skip.parameters()) == list(skip.buffers()) == []
    torch.testing.assert_close(model(X), model.blocks[1](X))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))


def test_a_block_with_two_names_is_replaced_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Residual()
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Twice().eval()
    assert found(model)[0] == ["a"]
    apply_surgery(model, Surgery(skipped=(SkippedBlock(path="a"),)))
    assert model.a is model.b
    assert torch.equal(model(X), X)


def test_bypassed_blocks_answer_with_what_they_were_given(noticed: Callable[[nn.Module], str]) -> None:
    model = chain(Residual("weights"), Residual(), Residual())
    before = noticed(model)
    blocks, _ = find_blocks(model, runs_of(X))
    with torch.no_grad():
        with bypassed(model, [blocks[0], blocks[2]]):
            inside = model(X)
        assert torch.equal(inside, model.blocks[1](X))
        assert not torch.equal(inside, model(X))
        with bypassed(model, blocks):
            assert torch.equal(model(X), X)
    assert noticed(model) == before


def test_bypassing_gives_the_input_as_it_was_before_the_block_changed_it() -> None:
    class InPlace(Residual):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            return x.add_(self.outer(self.inner(x).relu()))

    model = chain(InPlace())
    block = SkippedBlock(path="blocks.0")
    with torch.no_grad(), bypassed(model, [block]):
        assert torch.equal(model(X.clone()), X)


def test_hooks_go_when_the_model_fails(noticed: Callable[[nn.Module], str]) -> None:
    model = chain(Residual())
    before = noticed(model)
    with pytest.raises(RuntimeError), bypassed(model, [SkippedBlock(path="blocks.0")]):
        model(torch.ones(3, 5))
    with pytest.raises(Exception, match="does not run"):
        find_blocks(model, runs_of(torch.ones(3, 5)))
    assert noticed(model) == before


# --- lists, and what must fit


def test_a_list_keeps_some_of_its_modules_under_new_numbers() -> None:
    model = chain(*(Residual() for _ in range(4)))
    kept = [model.blocks[1], model.blocks[3]]
    apply_surgery(model, Surgery(shrunk=(Shrink(path="blocks", size=4, kept=(1, 3)),)))
    assert list(model.blocks) == kept
    assert {name.split(".")[1] for name in model.state_dict()} == {"0", "1"}
    torch.testing.assert_close(model(X), kept[1](kept[0](X)))


WRONG: list[tuple[Surgery, str]] = [
    (Surgery(skipped=(SkippedBlock(path="blocks.9"),)), "expects a module 'blocks.9', the model has none"),
    (Surgery(shrunk=(Shrink(path="other", size=2, kept=(0,)),)), "expects a module 'other', the model has none"),
    (Surgery(shrunk=(Shrink(path="blocks", size=3, kept=(0,)),)), "'blocks' must be .* of 3 modules.* it is .* of 2"),
    (Surgery(shrunk=(Shrink(path="blocks.0", size=2, kept=(0,)),)), "'blocks.0' must be .* it is Residual"),
    (Surgery(shrunk=(Shrink(path="blocks", size=2, kept=()),)), "ascending indices below 2"),
    (Surgery(shrunk=(Shrink(path="blocks", size=2, kept=(1, 0)),)), "ascending indices below 2"),
    (Surgery(shrunk=(Shrink(path="blocks", size=2, kept=(0, 0)),)), "ascending indices below 2"),
    (Surgery(shrunk=(Shrink(path="blocks", size=2, kept=(0, 2)),)), "ascending indices below 2"),
    (Surgery(shrunk=(Shrink(path="blocks", size=2, kept=(-1, 0)),)), "ascending indices below 2"),
]


@pytest.mark.parametrize(("surgery", "said"), WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    surgery: Surgery, said: str, noticed: Callable[[nn.Module], str]
) -> None:
    model = chain(Residual(), Residual())
    before = noticed(model)
    with pytest.raises(SurgeryError, match=said):
        apply_surgery(model, surgery)
    assert noticed(model) == before


def test_a_block_is_skipped_once() -> None:
    model = chain(Residual(), Residual())
    surgery = Surgery(skipped=(SkippedBlock(path="blocks.1"),))
    apply_surgery(model, surgery)
    with pytest.raises(SurgeryError, match="must be there still, it has been skipped before"):
        apply_surgery(model, surgery)
    assert found(model)[0] == ["blocks.0"]
