"""The callback in real Lightning runs: the records of a plain loop over the same batches, and the same weights."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from condzoo.probe import Probe, read_records

pl = pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # Lightning's own, torch >= 2.10
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


class Module(pl.LightningModule):
    """A small network that training_step calls by its parts, with a validation loop in between."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(24, 4))

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.head(self.body(x)), y)

    def validation_step(self, batch, index):
        self.training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(samples=40):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 3, 4, 4, generator=generator), torch.randint(4, (samples,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def fit(folder, callbacks=(), module=None, ckpt_path=None, **settings):
    module = module or Module()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = dict.fromkeys(quiet, False) | {"max_epochs": 1, "num_sanity_val_steps": 1} | settings
    torch.manual_seed(7)
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **settings)
    trainer.fit(module, loader(), loader(8), ckpt_path=ckpt_path)
    return module, trainer


def plain_loop(accumulate, every):
    """What Lightning does, by hand."""
    module, records = Module().train(), []
    optimizer = module.configure_optimizers()
    batches = list(loader())
    with Probe(module, every=every, loss_scale=1 / accumulate) as probe:
        for start in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for i, batch in enumerate(batches[start : start + accumulate]):
                probe.begin(batch)
                (module.training_step(batch, start + i) / accumulate).backward()
            optimizer.step()
            if probe.due:
                probe.step()
                records.append(probe.latest)
            else:
                probe.step()
    return module, records


def same_records(found, expected):
    assert [r.step for r in found] == [r.step for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert (list(a), a.samples, a.batches, a.neurons) == (list(b), b.samples, b.batches, b.neurons)
        for name in a:
            assert torch.equal(a[name].input.eigenvalues, b[name].input.eigenvalues)
            assert torch.equal(a[name].output_grad.eigenvalues, b[name].output_grad.eigenvalues)
            assert (a[name].weight, a[name].weight_grad) == (b[name].weight, b[name].weight_grad)


def same_weights(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("accumulate", [1, 3])  # 10 batches: the last step of 3 has only one
def test_a_fit_records_what_a_plain_loop_does_and_trains_as_without(tmp_path, accumulate):
    from condzoo.integrations.lightning import ProbeCallback

    settings = {"accumulate_grad_batches": accumulate, "val_check_interval": 2}
    without, _ = fit(tmp_path / "without", module=Module(dropout=0.2), **settings)
    probed, _ = fit(tmp_path / "probed", [ProbeCallback(every=3)], Module(dropout=0.2), **settings)
    same_weights(probed, without)
    callback = ProbeCallback(every=3)
    module, _ = fit(tmp_path, [callback], **settings)
    by_hand, expected = plain_loop(accumulate, every=3)  # without dropout, as Lightning draws numbers of its own
    same_weights(module, by_hand)
    assert [r.step for r in expected] == ([0, 3, 6, 9] if accumulate == 1 else [0, 3])
    same_records(read_records(tmp_path), expected)
    same_records([callback.probe.latest], expected[-1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_mixed_precision_is_measured_and_trains_as_without(tmp_path):
    from condzoo.integrations.lightning import ProbeCallback

    settings = {"precision": "bf16-mixed", "max_steps": 4}
    without, _ = fit(tmp_path / "without", **settings)
    probed, _ = fit(tmp_path, [ProbeCallback(every=3)], **settings)
    same_weights(probed, without)
    records, (_, expected) = read_records(tmp_path), plain_loop(1, every=3)
    assert [(r.step, r.dtype, r.skipped) for r in records] == [(0, "bfloat16", {}), (3, "bfloat16", {})]
    assert list(records[0]) == list(expected[0])
    for name, layer in expected[0].items():
        assert records[0][name].input.lambda_max == pytest.approx(layer.input.lambda_max, rel=0.05)
        assert records[0][name].output_grad.lambda_max == pytest.approx(layer.output_grad.lambda_max, rel=0.1)
        assert records[0][name].weight_grad == pytest.approx(layer.weight_grad, rel=0.05)


def test_a_resumed_fit_goes_on_with_its_step_and_an_exception_takes_the_hooks_off(tmp_path):
    from condzoo.integrations.lightning import ProbeCallback

    module, trainer = fit(tmp_path, [ProbeCallback(every=5, out=tmp_path / "run")], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, [ProbeCallback(every=5, out=tmp_path / "run")], ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert [r.step for r in read_records(tmp_path / "run")] == [0, 5, 10, 15]

    class Fails(Module):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            raise RuntimeError("in the middle")

    module = Fails()
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(tmp_path, [ProbeCallback()], module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class TwoOptimizers(Module):
    """As a GAN has them: each moves in every batch, and the trainer counts both."""

    automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def validation_step(self, batch, index):
        super().training_step(batch, index)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_with_two_optimizers_a_resumed_fit_goes_on_with_its_step(tmp_path):
    from condzoo.integrations.lightning import ProbeCallback

    def callbacks(folder):  # two, whose states are told apart
        return [ProbeCallback(every=5, out=tmp_path / folder), ProbeCallback(every=7, out=tmp_path / folder / "7")]

    _, trainer = fit(tmp_path, callbacks("run"), TwoOptimizers())
    assert trainer.global_step == 20
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    last = {"ckpt_path": tmp_path / "last.ckpt", "max_epochs": 2}
    fit(tmp_path, callbacks("run"), TwoOptimizers(), **last)
    assert [r.step for r in read_records(tmp_path / "run")] == [0, 5, 10, 15]
    assert [r.step for r in read_records(tmp_path / "run" / "7")] == [0, 7, 14]
    fit(tmp_path, [ProbeCallback(every=5, out=tmp_path / "later")], TwoOptimizers(), **last)  # none in the checkpoint
    assert [r.step for r in read_records(tmp_path / "later")] == [20, 25]


def test_with_two_optimizers_a_second_fit_of_the_trainer_goes_on_with_its_step(tmp_path):
    from condzoo.integrations.lightning import ProbeCallback

    callback = ProbeCallback(every=5, out=tmp_path / "run")
    module, trainer = fit(tmp_path, [callback], TwoOptimizers())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(8))
    assert trainer.global_step == 40
    assert [r.step for r in read_records(tmp_path / "run")] == [0, 5, 10, 15]
    callback.out = tmp_path / "another"
    fit(tmp_path, [callback], TwoOptimizers())
    assert [r.step for r in read_records(tmp_path / "another")] == [0, 5]


class Skips(Module):
    """Ends its first epoch before the third batch."""

    def on_train_batch_start(self, batch, index):
        return -1 if (self.current_epoch, index) == (0, 2) else None


def test_a_batch_that_is_skipped_is_no_part_of_the_next_step(tmp_path):
    from condzoo.integrations.lightning import ProbeCallback

    module, _ = fit(tmp_path / "probed", [ProbeCallback(every=1)], Skips(), max_epochs=2)
    same_weights(module, fit(tmp_path / "without", (), Skips(), max_epochs=2)[0])
    assert [(r.step, r.samples, r.batches) for r in read_records(tmp_path / "probed")] == [(i, 4, 1) for i in range(12)]


@pytest.mark.filterwarnings("ignore:The `average_fn` is deprecated")
@pytest.mark.parametrize("first", [True, False])
def test_the_epoch_that_only_renews_batch_statistics_is_not_recorded(tmp_path, first):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    from condzoo.integrations.lightning import ProbeCallback

    def averaging():
        return StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)

    probe = ProbeCallback(every=1)
    module, _ = fit(tmp_path / "probed", [probe, averaging()] if first else [averaging(), probe], max_epochs=2)
    same_weights(module, fit(tmp_path / "without", [averaging()], max_epochs=2)[0])
    records = read_records(tmp_path / "probed")
    assert [(r.step, r.samples, r.skipped) for r in records] == [(i, 4, {}) for i in range(20)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_wrong_setting_fails_at_once():
    from condzoo.integrations.lightning import ProbeCallback

    with pytest.raises(TypeError, match="unexpected keyword argument 'convs'"):
        ProbeCallback(convs="patches")
    with pytest.raises(ValueError, match="start_step is counted by the trainer"):
        ProbeCallback(start_step=100)
    with pytest.raises(ValueError, match="loss_scale must be"):
        ProbeCallback(loss_scale=0.0)
    with pytest.raises(TypeError, match="out must be a folder"):
        ProbeCallback(out=5)
    with pytest.raises(TypeError, match="tensorboard must be a folder"):
        ProbeCallback(tensorboard=5)
    with pytest.raises(TypeError, match="scaler must be"):
        ProbeCallback(scaler=2.0)


class Scaled(Module):
    """Multiplies its loss by 4."""

    def training_step(self, batch, index):
        return 4 * super().training_step(batch, index)


def test_a_factor_on_the_loss_is_undone_beside_the_trainers_own(tmp_path):
    from condzoo.integrations.lightning import ProbeCallback

    settings = {"accumulate_grad_batches": 2, "max_steps": 1}
    plain, scaled = ProbeCallback(), ProbeCallback(loss_scale=4.0, scaler=None)
    fit(tmp_path / "plain", [plain], **settings)
    fit(tmp_path / "scaled", [scaled], Scaled(), **settings)
    same_records([scaled.probe.latest], [plain.probe.latest])


def test_a_scaler_that_is_given_is_undone():
    from condzoo.integrations.lightning import ProbeCallback

    own, found = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 16.0))
    plugin = SimpleNamespace(scaler=found)
    trainer = SimpleNamespace(log_dir=None, default_root_dir=None, precision_plugin=plugin, global_step=0)
    trainer.accumulate_grad_batches, (x, y) = 1, next(iter(loader()))
    latest = []
    for factor, settings in ((8.0, {"scaler": own}), (16.0, {})):
        callback, module = ProbeCallback(**settings), Module()
        trainer.global_step = 0
        callback.on_train_start(trainer, module)
        callback.on_train_batch_start(trainer, module, (x, y), 0)
        (factor * module.training_step((x, y), 0)).backward()
        trainer.global_step = 1
        callback.on_train_batch_end(trainer, module, None, (x, y), 0)
        callback.on_train_end(trainer, module)
        latest.append(callback.probe.latest)
    same_records(latest[:1], latest[1:])


@dataclass
class Held:
    x: torch.Tensor
    y: torch.Tensor


class OfObjects(Module):
    """Takes its batches apart where they are no pairs."""

    def training_step(self, batch, index):
        return super().training_step((batch.x, batch.y), index)


def fit_on(kind, folder, **settings):
    from condzoo.integrations.lightning import ProbeCallback

    callback, quiet = ProbeCallback(every=2, **settings), ("logger", "enable_checkpointing", "enable_progress_bar")
    batches = DataLoader([kind(x=x, y=y) for x, y in loader()], batch_size=None, collate_fn=lambda batch: batch)
    options = dict.fromkeys(quiet, False) | {"enable_model_summary": False, "max_steps": 3, "num_sanity_val_steps": 0}
    pl.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[callback], **options).fit(
        OfObjects(), batches, batches
    )
    return read_records(folder)


def test_batches_that_are_objects(tmp_path):
    expected = fit_on(Held, tmp_path / "dataclass")
    assert [(r.step, r.samples) for r in expected] == [(0, 4), (2, 4)]
    for i, samples in enumerate((lambda batch: batch.y, lambda batch: len(batch.y), lambda batch: torch.tensor(4))):
        same_records(fit_on(SimpleNamespace, tmp_path / str(i), samples=samples), expected)
    with pytest.raises(TypeError, match=r"got SimpleNamespace; pass ProbeCallback\(samples=lambda batch: \.\.\.\)"):
        fit_on(SimpleNamespace, tmp_path / "untold")
