"""Models that Lightning's Fabric has set up: the author's names, and the numbers of the model inside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, measure

fabrics = pytest.importorskip("lightning.fabric")
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_that_fabric_wraps_has_its_authors_names(precision):
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(16, 6), torch.arange(16) % 3
    fabric = fabrics.Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    found, expected = measure(model, (x, y)), measure(net, (x, y))
    assert list(found) == ["0", "2"]
    assert all(torch.equal(found[name].input.eigenvalues, expected[name].input.eigenvalues) for name in found)
    with Probe(model, layers=["2"]) as probe:
        fabric.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        probe.step()
    assert (list(probe.latest), list(probe.latest.neurons)) == (["2"], ["1"])
    assert probe.latest.dtype == ("float32" if precision == "32-true" else "bfloat16")
