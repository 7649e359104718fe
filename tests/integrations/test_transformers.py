"""The callback in real runs of Hugging Face's Trainer: the records of a plain loop, and the same weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, read_records

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Tiny(nn.Module):
    """A module that takes what the Trainer passes and returns what it expects."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.2)
        self.fc = nn.Linear(24, 4)

    def forward(self, pixel_values, labels=None):
        logits = self.fc(self.drop(F.relu(self.bn(self.conv(pixel_values)).flatten(1))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def tiny_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=4, patch_size=2, num_labels=4, hidden_dropout_prob=0.1)
    return transformers.ViTForImageClassification(config)


class TinyBert(transformers.BertForSequenceClassification):
    """Its loss is the mean over its own batch, whatever the number of items that the Trainer passes it to divide by."""

    def __init__(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        super().__init__(transformers.BertConfig(vocab_size=8, num_labels=4, **sizes, **no_dropout))

    def forward(self, pixel_values, labels=None, **kwargs):
        return super().forward(inputs_embeds=pixel_values.flatten(2), labels=labels, **kwargs)


MODELS = {"module": Tiny, "vit": tiny_vit, "bert": TinyBert}


def images(samples=40):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 3, 4, 4, generator=generator), torch.randint(4, (samples,), generator=generator)
    return [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]


def fit(name, folder, callbacks=(), resume=None, model=None, **settings):
    """The model and the batches that the Trainer took, in its order."""
    model, batches = model or MODELS[name](), []

    def collate(samples):
        batches.append({key: torch.stack([s[key] for s in samples]) for key in samples[0]})
        return dict(batches[-1])

    quiet = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    plain = {"num_train_epochs": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "seed": 7, "use_cpu": True}
    arguments = transformers.TrainingArguments(str(folder), **(quiet | plain | settings))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=images(),
        optimizers=(optimizer, constant),
        callbacks=list(callbacks),
    )
    torch.manual_seed(7)
    trainer.train(resume_from_checkpoint=resume)
    return model, batches


def factor(name, together):
    """The Trainer leaves the division to Bert, which does not divide."""
    return 1.0 if name == "bert" else 1 / len(together)


def plain_loop(name, batches, accumulate, every):
    model, records = MODELS[name]().train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Probe(model, every=every) as probe:
        for start in range(0, len(batches), accumulate):
            together = batches[start : start + accumulate]
            optimizer.zero_grad()
            for batch in together:
                (model(**batch)["loss"] * factor(name, together)).backward()
            optimizer.step()
            due, probe.loss_scale = probe.due, factor(name, together)
            probe.step()
            if due:
                records.append(probe.latest)
    return model, records


def same_records(found, expected, tolerance):
    assert [r.step for r in found] == [r.step for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert (list(a), a.samples, a.batches, a.neurons) == (list(b), b.samples, b.batches, b.neurons)
        for name in a:
            for side in ("input", "output_grad"):
                x, y = getattr(a[name], side), getattr(b[name], side)
                assert float((x.eigenvalues - y.eigenvalues).abs().max()) <= tolerance * y.lambda_max
            assert a[name].weight == pytest.approx(b[name].weight, rel=tolerance)
            assert a[name].weight_grad == pytest.approx(b[name].weight_grad, rel=tolerance)


# 10 batches: the last step of 3 has only one. A ViT's loss is a sum divided by the samples of all 3, not a mean.
@pytest.mark.parametrize(("name", "accumulate"), [("module", 1), ("module", 3), ("vit", 3), ("bert", 3)])
def test_a_run_records_what_a_plain_loop_does_and_trains_as_without(tmp_path, name, accumulate, monkeypatch):
    from condzoo.integrations.transformers import ProbeCallback

    without, _ = fit(name, tmp_path / "without", gradient_accumulation_steps=accumulate)
    probed, _ = fit(name, tmp_path / "probed", [ProbeCallback(every=3)], gradient_accumulation_steps=accumulate)
    for (key, a), (_, b) in zip(without.state_dict().items(), probed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    # What dropout draws depends on what else the Trainer draws; a plain loop cannot repeat it.
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    callback = ProbeCallback(every=3, out=tmp_path / "run")
    model, batches = fit(name, tmp_path, [callback], gradient_accumulation_steps=accumulate)
    _, expected = plain_loop(name, batches, accumulate, every=3)
    assert [r.step for r in expected] == ([0, 3, 6, 9] if accumulate == 1 else [0, 3])
    same_records(
        read_records(tmp_path / "run"), expected, tolerance=1e-5
    )  # float32: a ViT's loss is a sum divided by n, not a mean
    assert read_records(tmp_path / "probed")[-1].step == expected[-1].step
    assert callback.probe.latest.step == expected[-1].step
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def losses():
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.arange(6) % 4
    items, aside = torch.tensor(18.0), x.square().mean()
    summed = F.cross_entropy(x, y, reduction="sum") / items
    return {
        "mean": (F.cross_entropy(x, y), True),
        "smoothed": (F.cross_entropy(x, y, label_smoothing=0.1), True),
        "of two heads, cast": (((F.cross_entropy(x, y) + F.cross_entropy(-x, y)) / 2).double(), True),
        "regression": (F.mse_loss(x, x.detach() + 1), True),
        "several labels": (F.binary_cross_entropy_with_logits(x, torch.ones_like(x)), True),
        "pixels": (F.cross_entropy(x.view(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long)), True),
        "divided by all items": (summed, False),
        "divided, and another": ((summed + 0.01 * aside).float(), False),
        "both": (summed + F.mse_loss(x, x.detach() + 1), False),
        "own": (aside, False),
        "no gradient": (summed.detach(), False),
        "none": (None, False),
    }


def test_a_loss_of_torchs_says_whether_it_is_its_batchs_mean():
    from condzoo.integrations.transformers import _is_mean

    for said, (loss, mean) in losses().items():
        assert _is_mean({"loss": loss, "logits": None}) == mean, said
        assert _is_mean((loss, None)) == mean, said
    assert not _is_mean(losses())
    assert not _is_mean(SimpleNamespace(loss=losses()["mean"]))


def test_a_smoothed_loss_of_older_transformers_is_each_batchs_mean(tmp_path, monkeypatch):
    from transformers.trainer_pt_utils import LabelSmoother

    from condzoo.integrations.transformers import ProbeCallback

    def fit_smoothed(folder):
        settings = {"gradient_accumulation_steps": 3, "label_smoothing_factor": 0.1, "max_steps": 1}
        fit("bert", folder, [ProbeCallback(every=1)], **settings)
        return read_records(folder)

    now, divides = fit_smoothed(tmp_path / "now"), LabelSmoother.__call__
    assert now[0].batches == 3

    def mean(self, output, labels, shift_labels=False, **ignored):
        return divides(self, output, labels, shift_labels)

    monkeypatch.setattr(LabelSmoother, "__call__", mean)
    same_records(fit_smoothed(tmp_path / "before"), now, tolerance=1e-5)


def test_bf16_is_measured_and_trains_as_without(tmp_path, monkeypatch):
    from condzoo.integrations.transformers import ProbeCallback

    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    settings = {"bf16": True, "max_steps": 4}
    without, _ = fit("module", tmp_path / "without", **settings)
    probed, batches = fit("module", tmp_path, [ProbeCallback(every=3)], **settings)
    for (key, a), (_, b) in zip(without.state_dict().items(), probed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    records, (_, expected) = read_records(tmp_path), plain_loop("module", batches[:4], 1, every=3)
    assert [(r.step, r.dtype, r.skipped) for r in records] == [(0, "bfloat16", {}), (3, "bfloat16", {})]
    for name, layer in expected[0].items():
        assert records[0][name].input.lambda_max == pytest.approx(layer.input.lambda_max, rel=0.05)
        assert records[0][name].output_grad.lambda_max == pytest.approx(layer.output_grad.lambda_max, rel=0.1)
        assert records[0][name].weight_grad == pytest.approx(layer.weight_grad, rel=0.05)


def test_a_resumed_run_goes_on_with_its_step(tmp_path):
    from condzoo.integrations.transformers import ProbeCallback

    saves = {"save_strategy": "steps", "save_steps": 10}
    fit("module", tmp_path, [ProbeCallback(every=5)], **saves)
    fit("module", tmp_path, [ProbeCallback(every=5)], str(tmp_path / "checkpoint-10"), **saves, num_train_epochs=2)
    assert [r.step for r in read_records(tmp_path)] == [0, 5, 10, 15]


def test_a_run_that_an_exception_ended_has_its_probe_closed_by_the_next_run_of_the_model(tmp_path):
    from condzoo.integrations.transformers import ProbeCallback

    model, fails = Tiny(), []

    def fail(module, args):
        if fails:
            raise RuntimeError("in the middle")

    class InTheSecondStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            fails.append(True)

    handle = model.register_forward_pre_hook(fail)
    ended = ProbeCallback(every=1, out=tmp_path / "ended")
    with pytest.raises(RuntimeError, match="in the middle"):
        fit("module", tmp_path, [ended, InTheSecondStep()], model=model)
    handle.remove()
    both = [ProbeCallback(every=5, out=tmp_path / name) for name in ("one", "other")]
    fit("module", tmp_path, both, model=model)
    for name, steps in (("ended", [0]), ("one", [0, 5]), ("other", [0, 5])):
        assert [r.step for r in read_records(tmp_path / name)] == steps
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="outside `with`"):
        ended.probe.step()


def test_a_loss_that_calls_parts_of_the_model_alone_leaves_no_hook(tmp_path):
    from condzoo.integrations.transformers import ProbeCallback

    model, callback = nn.Sequential(nn.Linear(4, 2)), ProbeCallback(every=1)
    args, state = transformers.TrainingArguments(tmp_path, use_cpu=True), transformers.TrainerState()
    callback.on_train_begin(args, state, None, model=model)
    own = len(model._forward_hooks)
    for _ in range(3):
        callback.on_step_begin(args, state, None)
        assert len(model._forward_hooks) == own + 1
        model[0](torch.ones(3, 4)).sum().backward()
        with pytest.warns(RuntimeWarning, match="no forward pass in train mode"):
            callback.on_step_end(args, state, None)
        assert len(model._forward_hooks) == own
    callback.on_train_end(args, state, None)
    assert not model._forward_hooks


def test_data_parallel_is_refused(tmp_path):
    from condzoo.integrations.transformers import ProbeCallback

    arguments, state = SimpleNamespace(n_gpu=2, output_dir=str(tmp_path)), SimpleNamespace(global_step=0)
    with pytest.raises(ValueError, match=r"on 2 GPUs by nn\.DataParallel.* start the script with torchrun"):
        ProbeCallback().on_train_begin(arguments, state, None, model=Tiny())


def test_a_wrong_setting_fails_at_once():
    from condzoo.integrations.transformers import ProbeCallback

    with pytest.raises(TypeError, match="unexpected keyword argument 'convs'"):
        ProbeCallback(convs="patches")
    with pytest.raises(ValueError, match="start_step is counted by the trainer"):
        ProbeCallback(start_step=100)
    with pytest.raises(ValueError, match="loss_scale must be"):
        ProbeCallback(loss_scale=float("nan"))


def test_factors_on_the_loss_are_undone_beside_the_trainers_own():
    """A step by hand, of two accumulated batches, as the Trainer tells its callbacks of one."""
    from condzoo.integrations.transformers import ProbeCallback

    own, found = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 16.0))
    latest = []
    for factor, settings in ((16, {}), (8, {"scaler": own}), (64, {"loss_scale": 4.0, "scaler": None})):
        callback, model = ProbeCallback(**settings), Tiny()
        model.drop.p = 0.0
        arguments, state = SimpleNamespace(n_gpu=0, output_dir=None), SimpleNamespace(global_step=0)
        callback.on_train_begin(arguments, state, None, model=model, optimizer=SimpleNamespace(scaler=found))
        callback.on_step_begin(arguments, state, None)
        for part in (images()[:6], images()[6:12]):
            batch = {key: torch.stack([sample[key] for sample in part]) for key in part[0]}
            (factor * model(**batch)["loss"] / 2).backward()
        callback.on_substep_end(arguments, state, None)
        callback.on_step_end(arguments, state, None)
        callback.on_train_end(arguments, state, None)
        latest.append(callback.probe.latest)
    for record in latest[1:]:
        same_records([record], latest[:1], tolerance=1e-6)
