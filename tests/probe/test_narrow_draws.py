"""What `certify=True` calls the dtype's error, of networks that draw random numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import measure
from condzoo.probe.narrow_draws import NarrowDraws

NOISE = {
    "randn_like": lambda h: h + torch.randn_like(h),
    "randn": lambda h: h + torch.randn(h.shape, dtype=h.dtype),
    "rand_like": lambda h: h * (torch.rand_like(h) > 0.5),
    "stochastic depth": lambda h: h * h.new_empty((len(h), 1)).bernoulli_(0.7) / 0.7,
    "exponential_": lambda h: h + torch.empty_like(h).exponential_(),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "normal": lambda h: torch.normal(h.detach(), 1.0) + h,
    "dropout": lambda h: F.dropout(h, 0.3),
    "dropout in place": lambda h: F.dropout(h + 1, 0.3, True, True),
    "dropout of maps": lambda h: F.dropout2d(h[:, :, None, None], 0.3)[:, :, 0, 0],
    "in the default dtype": lambda h: h + torch.randn(h.shape).to(h.dtype),
}


class Noisy(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, h):
        return NOISE[self.kind](h)


@pytest.mark.parametrize("kind", list(NOISE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_in_float64_draws_what_the_network_draws(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Noisy(kind), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(64, 6).to(dtype), torch.arange(64) % 3
    certificate = measure(model, (x, y), certify=True).certificate["3"]
    moved = max(certificate["input_lambda_max"], certificate["output_grad_lambda_max"])
    assert moved < (1e-5 if dtype == torch.float32 else 0.01)


def test_what_is_not_drawn_in_float64_is_left_alone():
    own = torch.Generator()
    with NarrowDraws(torch.bfloat16):
        assert torch.rand_like(torch.ones(3).double(), dtype=torch.float32).dtype == torch.float32
        torch.manual_seed(0)
        found = torch.randn(3), torch.randn(3, dtype=torch.float64, generator=own.manual_seed(1))
    torch.manual_seed(0)
    assert torch.equal(found[0], torch.randn(3))
    assert torch.equal(found[1], torch.randn(3, dtype=torch.float64, generator=own.manual_seed(1)))
