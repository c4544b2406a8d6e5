from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.distill.pairs import Attention, Pair, propose, propose_attention
from tersor.errors import ConfigError, ModelError, OutputError
from tersor.probe.outputs import Outputs
from zoo import Mlp, integers, normal, seeded

ROOT = Path(__file__).resolve().parents[2]
IMAGES = normal(2, 3, 32, 32)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar_resnet", ROOT / "examples" / "cifar_resnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def vgg(*widths: int) -> nn.Sequential:
    """Convolution, norm, ReLU in place and pooling, once for each width."""
    parts: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        parts += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d(2)]
    side = 32 >> len(widths)
    return nn.Sequential(nn.Sequential(*parts), nn.Flatten(), nn.Linear(widths[-1] * side**2, 10)).eval()


def encoder(layers: int, width: int = 8, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, **{"batch_first": True} | settings)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=layer.self_attn.batch_first)


class Bottleneck(nn.Module):
    """1x1, 3x3 with stride, 1x1, as in ResNet-50: its first layer still has the resolution of the stage before."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs // 4, 1)
        self.conv2 = nn.Conv2d(outputs // 4, outputs // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(outputs // 4, outputs, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x))))) + self.shortcut(x))


def bottlenecks(*counts: int) -> nn.Sequential:
    stages = nn.Sequential()
    for place, count in enumerate(counts):
        row = [Bottleneck(16 << (place - (place > 0)), 16 << place, 1 + (place > 0))]
        row += [Bottleneck(16 << place, 16 << place, 1) for _ in range(count - 1)]
        stages.add_module(f"stage{place}", nn.Sequential(*row))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Block1d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class Characters(nn.Module):
    def __init__(self, width: int, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, width, 2, batch_first=batch_first)
        self.head = nn.Linear(width, 20)

    def forward(self, words: Tensor) -> Tensor:
        words = words if self.lstm.batch_first else words.T
        return self.head(self.lstm(self.embedding(words))[0])


def addresses(pairs: tuple[Pair, ...]) -> list[tuple[str, str]]:
    return [(pair.student, pair.teacher) for pair in pairs]


def check_shapes(student: nn.Module, teacher: nn.Module, batch: Batch, pairs: tuple[Pair, ...]) -> None:
    """What is proposed can be captured, and looks as it was said to."""
    sides = (
        (student, [(pair.student, pair.student_shape) for pair in pairs]),
        (
            teacher,
            [(pair.teacher, pair.teacher_shape) for pair in pairs],
        ),
    )
    for model, expected in sides:
        with torch.no_grad(), Outputs(model.eval(), [address for address, _ in expected]) as outputs:
            batch.call(model)
            features = outputs.take()
        assert all(tuple(features[address].shape) == shape for address, shape in expected)


def test_stages_of_cifar_resnets(example: ModuleType, noticed: Callable[[nn.Module], str]) -> None:
    student, teacher = example.CifarResNet(20).train(), example.CifarResNet(56).eval()
    before = noticed(student), noticed(teacher)
    batch = Batch((IMAGES,), {}, None)
    pairs = propose(student, teacher, batch)
    assert (noticed(student), noticed(teacher)) == before
    assert [str(pair) for pair in pairs] == [
        "layer1 [B, 16, 32, 32] <- layer1 [B, 16, 32, 32]",
        "layer2 [B, 32, 16, 16] <- layer2 [B, 32, 16, 16]",
        "layer3 [B, 64, 8, 8] <- layer3 [B, 64, 8, 8]",
    ]
    check_shapes(student, teacher, batch, pairs)


def test_resolutions_of_a_plain_sequence() -> None:
    student, teacher = vgg(4, 8, 12), vgg(8, 16, 24)
    pairs = propose(student, teacher, IMAGES)
    assert addresses(pairs) == [("0.2", "0.2"), ("0.6", "0.6"), ("0.10", "0.10")]
    assert [pair.student_shape for pair in pairs] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 12, 8, 8)]
    check_shapes(student, teacher, Batch((IMAGES,), {}, None), pairs)


def test_a_stage_does_not_end_inside_the_next_ones_first_block() -> None:
    pairs = propose(bottlenecks(1, 1, 1), bottlenecks(2, 3, 2), IMAGES)
    expected = [f"1.stage{place}" for place in range(3)]
    assert addresses(pairs) == [(path, path) for path in expected]


def test_only_resolutions_of_both_are_paired() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())
    assert addresses(propose(student, vgg(4, 8, 12), IMAGES)) == [("1", "0.6"), ("3", "0.10")]


def test_other_resolutions_are_paired_by_depth() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 3), nn.ReLU())
    assert addresses(propose(student, vgg(4, 4, 4, 4), IMAGES)) == [("1", "0.6"), ("3", "0.14")]


def test_maps_in_one_dimension_are_no_tokens() -> None:
    def build(blocks: int) -> nn.Module:
        row = nn.Sequential(*(Block1d(6) for _ in range(blocks)))
        return nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), row, nn.AdaptiveAvgPool1d(1), nn.Flatten())

    assert addresses(propose(build(2), build(5), normal(3, 2, 9))) == [("1", "1")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 4, [3]),
        (2, 4, [1, 3]),
        (2, 5, [2, 4]),
        (3, 6, [1, 3, 5]),
        (4, 6, [1, 2, 4, 5]),
        (4, 1, [0, 0, 0, 0]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_blocks_at_the_same_depth(low: int, high: int, expected: list[int]) -> None:
    student, teacher = encoder(low).eval(), encoder(high, 12).eval()
    wide = nn.Sequential(nn.Linear(8, 12), teacher)
    batch = Batch((normal(2, 5, 8),), {}, None)
    pairs = propose(student, wide, batch)
    assert addresses(pairs) == [(f"layers.{i}", f"1.layers.{j}") for i, j in enumerate(expected)]
    check_shapes(student, wide, batch, pairs)


def test_a_count_spreads_the_pairs() -> None:
    student, teacher = encoder(6), encoder(12)
    for count, expected in ((1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (6, [0, 1, 2, 3, 4, 5])):
        pairs = propose(student, teacher, normal(2, 5, 8), count=count)
        assert [pair.student for pair in pairs] == [f"layers.{place}" for place in expected]
        assert [pair.teacher for pair in pairs] == [f"layers.{2 * place + 1}" for place in expected]
    for count in (0, 7):
        with pytest.raises(ConfigError, match="a count from 1 to 6"):
            propose(student, teacher, normal(2, 5, 8), count=count)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_padded_batches_of_an_encoder() -> None:
    student, teacher = encoder(2).eval(), encoder(4).eval()
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    batch = {"src": normal(2, 5, 8), "src_key_padding_mask": padding}
    student.use_nested_tensor = teacher.use_nested_tensor = False
    assert len(propose(student, teacher, batch)) == 2
    teacher.use_nested_tensor = True
    with pytest.raises(ModelError, match="use_nested_tensor = False") as raised:
        propose(student, teacher, batch)
    assert isinstance(raised.value.__cause__, OutputError)
    assert not any(module._forward_hooks for module in teacher.modules())


def test_the_output_of_an_lstm() -> None:
    words = integers(20, 2, 7)
    pairs = propose(Characters(8), Characters(12), words)
    assert [str(pair) for pair in pairs] == ["lstm[0] [B, 7, 8] <- lstm[0] [B, 7, 12]"]
    with pytest.raises(ConfigError, match="batch first"):
        propose(Characters(8), Characters(12, batch_first=False), words)


def test_layers_of_different_kinds_are_not_paired() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.encoder = nn.Conv2d(3, 8, 8, 8), encoder(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(self.cut(x).flatten(2).transpose(1, 2))

    message = (
        r"3 \('0.2' to '0.10'\) of the student \(feature maps\) with 2 .* of the teacher \(blocks\); name the pairs"
    )
    with pytest.raises(ConfigError, match=message):
        propose(vgg(4, 8, 12), Patches(), IMAGES)


def test_what_has_no_such_layers_is_refused_with_what_it_has() -> None:
    with pytest.raises(ConfigError, match=r"the student, a Mlp, .*name the pairs yourself.*'first' \[B, "):
        propose(seeded(Mlp), seeded(Mlp), normal(2, 12))


def test_a_batch_that_does_not_fit_leaves_nothing_behind(noticed: Callable[[nn.Module], str]) -> None:
    model = vgg(4, 8).train()
    before = noticed(model)
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        propose(model, model, normal(2, 4, 32, 32))
    assert noticed(model) == before


def test_compiled_models_are_seen_through() -> None:
    model = vgg(4, 8)
    expected = propose(model, model, IMAGES)
    wrapped: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        wrapped(IMAGES)
    assert propose(wrapped, model, IMAGES) == expected
    model.compile(backend="eager")
    with torch.no_grad():
        model(IMAGES)
    assert propose(model, wrapped, IMAGES) == expected
    assert addresses(expected) == [("0.2", "0.2"), ("0.6", "0.6")]


def transformers_models() -> dict[str, tuple[Callable[[int], nn.Module], str]]:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}

    def bert(layers: int) -> nn.Module:
        return transformers.BertModel(transformers.BertConfig(**small, num_hidden_layers=layers))

    def distilbert(layers: int) -> nn.Module:
        config = transformers.DistilBertConfig(vocab_size=20, dim=8, n_layers=layers, n_heads=2, hidden_dim=16)
        return transformers.DistilBertForSequenceClassification(config)

    def gpt2(layers: int) -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=9, n_embd=8, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=1
        )
        return transformers.GPT2LMHeadModel(config)

    def llama(layers: int) -> nn.Module:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, num_hidden_layers=layers, num_key_value_heads=1)
        )

    def vit(layers: int) -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=16,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config)

    def t5(layers: int) -> nn.Module:
        config = transformers.T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=layers, num_decoder_layers=layers, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)

    return {
        "bert": (bert, "encoder.layer"), "distilbert": (distilbert, "distilbert.transformer.layer"),
        "gpt2": (gpt2, "transformer.h"), "llama": (llama, "model.layers"), "vit": (vit, "vit.layers"),
        "t5": (t5, "encoder.block"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "vit", "t5"])
def test_blocks_of_transformers(name: str) -> None:
    build, stem = transformers_models()[name]
    student, teacher = build(2), build(4)
    words = integers(20, 2, 7)
    inputs = {"pixel_values": IMAGES} if name == "vit" else {"input_ids": words}
    if name == "t5":
        inputs["decoder_input_ids"] = words
    batch = Batch((), inputs, None)
    pairs = propose(student, teacher, batch)
    found = [(pair.student.removesuffix("[0]"), pair.teacher.removesuffix("[0]")) for pair in pairs]
    if name == "vit" and found[0][0].startswith("vit.encoder"):  # before transformers 5
        stem = "vit.encoder.layer"
    expected = [(f"{stem}.0", f"{stem}.1"), (f"{stem}.1", f"{stem}.3")]
    if name == "t5":
        expected += [("decoder.block.0", "decoder.block.1"), ("decoder.block.1", "decoder.block.3")]
    assert found == expected
    check_shapes(student, teacher, batch, pairs)


def test_projections_of_the_last_block() -> None:
    models = transformers_models()
    low, high = propose_attention(models["bert"][0](1), models["bert"][0](3))
    stem = "encoder.layer.2.attention.self"
    assert high == Attention(f"{stem}.query", f"{stem}.key", f"{stem}.value")
    assert low.query == "encoder.layer.0.attention.self.query"
    student, teacher = models["distilbert"][0](2), models["llama"][0](2)
    low, high = propose_attention(student, teacher)
    assert low == Attention(*(f"distilbert.transformer.layer.1.attention.{name}_lin" for name in "qkv"))
    assert high == Attention(*(f"model.layers.1.self_attn.{name}_proj" for name in "qkv"))
    with Outputs(teacher, high) as outputs:
        teacher(integers(20, 2, 7))
        assert [tuple(value.shape) for value in outputs.take().values()] == [(2, 7, 8), (2, 7, 4), (2, 7, 4)]


def test_attention_to_another_sequence_does_not_count() -> None:
    _, found = propose_attention(*[transformers_models()["t5"][0](2)] * 2)
    assert found.query == "decoder.block.1.layer.0.SelfAttention.q"


def test_fused_projections_are_refused_with_the_reason() -> None:
    bert, gpt2 = (transformers_models()[name][0](2) for name in ("bert", "gpt2"))
    with pytest.raises(ConfigError, match=r"the teacher computes .* in one matrix, 'transformer.h.1.attn.c_attn'"):
        propose_attention(bert, gpt2)
    with pytest.raises(ConfigError, match=r"the student .* one matrix, 'layers.1.self_attn.in_proj_weight'"):
        propose_attention(encoder(2), bert)
    with pytest.raises(ConfigError, match=r"the student, a Mlp, has no module with parts query/key/value, q_proj/"):
        propose_attention(seeded(Mlp), bert)


def test_the_page_runs() -> None:
    page = (ROOT / "docs/methods/distill-taps.md").read_text()
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert script.count("assert") == 3
    with torch.random.fork_rng(devices=[]):
        exec(compile(script, "distill-taps", "exec"), {})  # noqa: S102 - our own page
