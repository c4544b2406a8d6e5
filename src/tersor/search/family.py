"""What kind of network a model is, by where its multiply-accumulates are and what it answers.

Shapes: `B` batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import frozen_copy
from tersor.core.config import Config
from tersor.core.task import Task
from tersor.errors import ModelError, TersorError
from tersor.measure import mac_counts

FamilyName = Literal["cnn", "transformer", "rnn", "lm", "mlp", "mixed"]
MOST = 0.5  # share of the multiply-accumulates from which one kind of layer gives a network its name
SOME = 0.1  # share below which a kind of layer is an accessory, such as the convolution before a transformer
# Names of the layers that make queries, keys and values, apart or in one.
PROJECTIONS = (
    *({"q", "k", "v"}, {"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"}, {"q_lin", "k_lin", "v_lin"}),
    *(
        {"to_q", "to_k", "to_v"},
        {"wq", "wk", "wv"},
        {"qkv"},
        {"in_proj_qkv"},
        {"c_attn"},
        {"query_key_value"},
        {"Wqkv"},
    ),
)


class Profile(Config):
    """Where a model computes.

    Attributes:
        family: What it is called by that.
        convolution: Share of the multiply-accumulates in convolutions.
        recurrent: Likewise in recurrent layers.
        attention: Whether it attends.
        parameters: Tied ones once.
        macs: Multiply-accumulates at batch 1.
    """

    family: FamilyName
    convolution: float = Field(ge=0, le=1)
    recurrent: float = Field(ge=0, le=1)
    attention: bool
    parameters: int
    macs: int


def family_of(model: nn.Module, task: Task) -> FamilyName:
    """What kind of network a model is; `profile` has the reasons.

    Raises:
        ModelError: if the model does not run on the task's first examples.
    """
    return profile(model, task).family


def profile(model: nn.Module, task: Task) -> Profile:
    """Runs a copy of the model on the first examples and looks at what computes.

    At least half of the multiply-accumulates in recurrent layers make an `rnn`, in convolutions a `cnn` (with attention
    nine tenths). A network that attends, without more than a tenth in either, is a `transformer`, and an `lm` if it
    answers tokens with `[B, T, V]`, `V` being the size of its look-up table, and earlier answers do not change with
    later tokens. Linear layers alone are an `mlp`; everything else is `mixed`.

    Args:
        model: Stays as it is.
        task: For example inputs.

    Raises:
        ModelError: if the model does not run on the task's first examples.
    """
    twin = frozen_copy(model)
    try:
        macs = mac_counts(twin, task.example(1))
        with torch.no_grad(), _Attention() as watch:
            answer = select_output(task.example(2).call(twin), task.output)
    except TersorError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model does not run on the task's first examples: {str(error).splitlines()[0]}"
        ) from error
    total = macs[""]
    convolution = _share(twin, macs, (_ConvNd,))
    recurrent = _share(twin, macs, (nn.RNNBase, nn.RNNCellBase))
    attention = watch.seen or any(_projects(module) for module in twin.modules())
    causal = _answers_next_tokens(twin, task, answer)
    return Profile(
        family=_name(convolution, recurrent, attention=attention, causal=causal),
        convolution=convolution,
        recurrent=recurrent,
        attention=attention,
        parameters=sum(parameter.numel() for parameter in twin.parameters()),
        macs=total,
    )


def _name(convolution: float, recurrent: float, *, attention: bool, causal: bool) -> FamilyName:
    if recurrent >= MOST or (causal and recurrent and not attention):
        return "rnn"
    if convolution >= (1 - SOME if attention else MOST):
        return "cnn"
    if convolution > SOME or recurrent > SOME:
        return "mixed"
    if causal:
        return "lm"
    if attention:
        return "transformer"
    return "mixed" if recurrent else "mlp"


def _share(model: nn.Module, macs: dict[str, int], kinds: tuple[type[nn.Module], ...]) -> float:
    found = sum(macs.get(path, 0) for path, module in model.named_modules() if isinstance(module, kinds))
    return min(1.0, found / macs[""]) if macs[""] else 0.0


def _projects(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    return isinstance(module, nn.MultiheadAttention) or any(wanted <= names for wanted in PROJECTIONS)


class _Attention(TorchFunctionMode):
    """Notices whether scaled dot products of attention are taken."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _answers_next_tokens(model: nn.Module, task: Task, answer: Tensor) -> bool:
    """Whether it answers tokens `[B, T]` with `[B, T, V]`, the earlier ones whatever comes later.

    Half of the tokens change, not only the last, which may be padding.
    """
    batch, tables = task.example(2), [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    if answer.ndim != 3 or answer.shape[1] < 2 or answer.shape[2] not in tables:
        return False
    fitting = [
        tensor
        for tensor in batch.tensors().values()
        if tensor.shape == answer.shape[:2] and tensor.dtype in (torch.int32, torch.int64)
    ]
    if not fitting:
        return False
    tokens = max(fitting, key=lambda tensor: int(tensor.max()))  # the others are masks and kinds of sentences
    half = tokens.shape[1] // 2
    changed = tokens.clone()
    changed[:, half:] = (changed[:, half:] + 1) % answer.shape[2]
    later = Batch.map(batch, lambda tensor: changed if tensor is tokens else tensor)
    with torch.no_grad():
        other = select_output(later.call(model), task.output)
    same = torch.allclose(other[:, :half], answer[:, :half], rtol=1e-4, atol=1e-5)
    return same and not torch.allclose(other[:, half:], answer[:, half:], rtol=1e-4, atol=1e-5)
