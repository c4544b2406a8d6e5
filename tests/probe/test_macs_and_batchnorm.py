from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.errors import DataError, ModelError
from tersor.probe import multiply_accumulates, reestimate_batchnorm


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Linear(3, 4), (2, 3), 2 * 3 * 4),
        (nn.Linear(3, 4, bias=False), (2, 5, 3), 2 * 5 * 3 * 4),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 7), 2 * 5 * 7 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=4), (1, 8, 5, 5), 25 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 3, 3), 9 * 4 * 6 * 4),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (1, 3, 4, 4), 0),
        (nn.LSTM(3, 4, bias=False), (6, 2, 3), 6 * 2 * 4 * 4 * (3 + 4)),
    ],
)
def test_products_are_counted(model: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert multiply_accumulates(model, (torch.randn(shape),), {}) == expected


def test_attention_is_counted_the_same_fused_or_not() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 8, batch_first=True)
    tokens, width = 4, 12
    projections = tokens * (3 * width * width + width * width + 2 * width * 8)
    scores = 2 * tokens * tokens * width
    for training in (True, False):
        found = multiply_accumulates(layer.train(training), (torch.randn(1, tokens, width),), {})
        assert found == projections + scores


def test_keywords_are_passed() -> None:
    assert multiply_accumulates(nn.Linear(3, 4), (), {"input": torch.randn(2, 3)}) == 24


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_the_model_and_the_switches(fails: bool, noticed: Callable[[nn.Module], str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4)).train()
    model[1].eval()
    before = noticed(model)
    switches = (torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled())
    if fails:
        with pytest.raises(ModelError):
            multiply_accumulates(model, (torch.randn(2, 5),), {})
    else:
        multiply_accumulates(model, (torch.randn(2, 3),), {})
    assert noticed(model) == before
    assert (torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()) == switches


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).eval()


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [3.0 + torch.randn(8, 3, 4, 4) for _ in range(count)]


def test_statistics_become_plain_averages_over_the_batches() -> None:
    model = net()
    assert reestimate_batchnorm(model, batches()) == 2
    with torch.no_grad():
        hidden = [model[0](batch) for batch in batches()]
    norm: Any = model[1]
    mean = torch.stack([part.mean((0, 2, 3)) for part in hidden]).mean(0)
    variance = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in hidden]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


def test_old_statistics_have_no_say() -> None:
    models = [net(), net()]
    models[1][1].running_mean.fill_(100.0)
    for model in models:
        reestimate_batchnorm(model, batches())
    assert torch.equal(models[0][4].running_mean, models[1][4].running_mean)


def test_weights_modes_and_momentum_stay() -> None:
    model = net()
    model[1].momentum = 0.3
    model[0].train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    reestimate_batchnorm(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_when_a_batch_does_not_fit() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [torch.randn(2, 5, 4, 4)])
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1


def test_dropout_stays_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).eval()
    reestimate_batchnorm(model, [torch.ones(8, 3)])
    norm: Any = model[1]
    assert torch.equal(norm.running_var, torch.zeros(3))


def test_without_batch_norm_no_batch_is_read() -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    fixed = nn.BatchNorm1d(3, track_running_stats=False)
    assert reestimate_batchnorm(nn.Sequential(nn.Linear(3, 3), fixed), unread()) == 0


def test_labels_are_no_input() -> None:
    model = net()
    assert reestimate_batchnorm(model, [(batch, torch.zeros(8, dtype=torch.long)) for batch in batches()]) == 2


def flat() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    ).eval()


def test_a_last_batch_of_one_example_is_left_out() -> None:
    models = [flat(), flat()]
    assert reestimate_batchnorm(models[0], [*batches(2), batches()[2][:1]]) == 2
    reestimate_batchnorm(models[1], batches(2))
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])


@pytest.mark.parametrize("place", [0, 1])
def test_single_values_have_no_variance_and_the_old_statistics_stay(place: int) -> None:
    model, given = flat(), batches(2)
    model[4].running_mean.fill_(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given.insert(place, given[0][:1])
    with pytest.raises(DataError, match=r"BatchNorm '4' needs several values per channel.*\(1, 5\)"):
        reestimate_batchnorm(model, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_batch_of_one_image_is_enough_where_channels_are_maps() -> None:
    assert reestimate_batchnorm(net(), [batches()[0][:1]]) == 2


def test_layers_that_no_batch_reaches_keep_their_statistics() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(input=x)

    model = Idle().eval()
    for norm in (model.used, model.idle):
        norm.running_mean.fill_(7.0)
    assert reestimate_batchnorm(model, []) == 0
    assert reestimate_batchnorm(model, [torch.zeros(4, 3)]) == 1
    assert (float(model.used.running_mean[0]), float(model.idle.running_mean[0])) == (0.0, 7.0)
