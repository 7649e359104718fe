"""Small networks of many kinds, and an oracle that knows nothing of the probe.

The oracle adds a zero tensor to a layer's output and differentiates the loss with respect to it, writes
every row out with explicit indices, and takes the singular values of the row matrix: no Gram matrix, no
hooks on gradients, no running sums.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from condzoo.probe import native


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a shortcut, in-place ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Attention(nn.Module):
    """Single-head self-attention over tokens out of linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head(self.proj(F.scaled_dot_product_attention(q, k, v)).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.ReLU(True), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))


def _bn_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.BatchNorm1d(9), nn.ReLU(True), nn.Linear(9, 4))


def _conv() -> nn.Module:
    body = [nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(True), nn.Conv2d(6, 8, 3, groups=2, dilation=2, padding=2)]
    return nn.Sequential(*body, nn.ReLU(True), nn.Conv2d(8, 8, 2, groups=8), nn.Flatten(), nn.LazyLinear(4))


def _odd_conv() -> nn.Module:
    first = nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2), padding_mode="reflect")
    body = [first, nn.GELU(), nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.Conv2d(4, 2, 3, padding="same")]
    return nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(4))


def _residual() -> nn.Module:
    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), Residual(6)]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 4))


def _other_dimensions() -> nn.Module:
    body = [nn.Unflatten(2, (2, 2)), nn.Conv3d(3, 4, (2, 2, 3), padding=(0, 1, 1)), nn.ReLU(True), nn.Flatten(2)]
    return nn.Sequential(*body, nn.Conv1d(4, 5, 3, stride=2), nn.ReLU(True), nn.Flatten(), nn.LazyLinear(4))


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Linear(16, 6), Attention(6))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "bn_mlp": _bn_mlp,
    "conv": _conv,
    "odd_conv": _odd_conv,
    "residual": _residual,
    "other_dimensions": _other_dimensions,
    "tokens": _tokens,
}


def images(samples: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random images [n, 3, 4, 4] and labels [n] in 0..3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((samples, 3, 4, 4), generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (samples,), generator=generator)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A seeded network on images [n, 3, 4, 4], its lazy layers initialized, running statistics not trivial."""
    torch.manual_seed(1)
    network = NETWORKS[name]()
    network(images(dtype=torch.float32)[0])
    return network.to(dtype)


def rows_of(tensor: Tensor, channels_first: bool) -> Tensor:
    """[n, c, *hw] or [n, ..., d] to rows."""
    return tensor.flatten(2).transpose(1, 2).flatten(0, 1) if channels_first else tensor.reshape(-1, tensor.shape[-1])


def patch_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Every patch written out index by index, [rows, c, kernel]."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if module.padding == "same":
        pad = [side for k in reversed(module.kernel_size) for side in ((k - 1) // 2, (k - 1) - (k - 1) // 2)]
    else:
        pad = [side for p in reversed(module.padding) for side in (p, p)]
    x = F.pad(x, pad, mode=mode)
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    corners = [range(0, n - r, s) for n, r, s in zip(x.shape[2:], reach, module.stride, strict=True)]
    patches = []
    for corner in itertools.product(*corners):
        index = [range(a, a + r + 1, d) for a, r, d in zip(corner, reach, module.dilation, strict=True)]
        values = [x[(slice(None), slice(None), *at)] for at in itertools.product(*index)]
        patches.append(torch.stack(values, dim=-1))
    return torch.cat(patches)


def eigenvalues(rows: Tensor, groups: int, count: int) -> Tensor:
    """Eigenvalues of (1 / count) rows^T rows by blocks of coordinates, from singular values."""
    found = []
    for block in rows.chunk(groups, dim=1):
        values = torch.zeros(block.shape[1], dtype=torch.float64)
        singular = torch.linalg.svdvals(block.double())
        values[: len(singular)] = singular.square() / count
        found.append(values)
    return torch.cat(found).sort(descending=True).values


def oracle(model: nn.Module, x: Tensor, y: Tensor, conv: str = "channels") -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output-gradient eigenvalues of every layer of a network without shared layers."""
    seen, handles = {}, []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or "Conv" in type(m).__name__}

    def add(name: str, h: Tensor, inputs: Tensor) -> Tensor:
        zero = torch.zeros_like(h, requires_grad=True)
        seen[name] = inputs.detach().clone(), zero
        return h + zero

    for name, module in layers.items():
        handles.append(module.register_forward_hook(lambda m, a, h, name=name: add(name, h, a[0])))
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = {}
    for name, (inputs, zero) in seen.items():
        module, spatial = layers[name], not isinstance(layers[name], nn.Linear)
        groups = getattr(module, "groups", 1)
        if conv == "patches" and spatial and "Transpose" not in type(module).__name__:
            input_rows = patch_rows(module, inputs).flatten(1)
        else:
            input_rows = rows_of(inputs, spatial)
        grad_rows = rows_of(zero.grad * len(x), spatial)
        found[name] = (
            eigenvalues(input_rows, groups, len(input_rows)),
            eigenvalues(grad_rows, groups, len(grad_rows)),
        )
    return found


def labellings(log_p: Tensor, h: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every combination of a batch's labels: its probability, and the gradient of the batch's summed loss in h."""
    for labels in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        chosen = log_p[range(len(log_p)), labels].sum()
        (grad,) = torch.autograd.grad(-chosen, h, retain_graph=True)
        yield chosen.detach().exp(), grad


class Kit:
    """What the tests of this folder take from here."""

    networks = tuple(NETWORKS)
    build = staticmethod(build)
    images = staticmethod(images)
    oracle = staticmethod(oracle)
    rows_of = staticmethod(rows_of)
    patch_rows = staticmethod(patch_rows)
    eigenvalues = staticmethod(eigenvalues)
    labellings = staticmethod(labellings)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """This process as one of a group, alone in it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(params=["compiled products", "torch's products"])
def products(request):
    """Both kinds of products that a CPU has, one after the other."""
    if request.param == "torch's products":
        request.getfixturevalue("torch_products")
    elif native.library() is None:
        pytest.skip("no C compiler with OpenMP")


@pytest.fixture
def torch_products(monkeypatch):
    """As on a machine without a C compiler."""
    monkeypatch.setattr(native, "library", lambda: None)
