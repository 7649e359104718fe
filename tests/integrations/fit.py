"""A fit with the probe's callback in each of several processes.

An epoch is one batch, so that its order does not matter; in float64, so that its split does not either.
"""

import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, STEPS, RATE = 16, 3, 0.1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def examples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 6, generator=generator, dtype=torch.float64), torch.randint(
        4, (BATCH,), generator=generator
    )


def fit_by_lightning(out, world):
    import lightning

    from condzoo.integrations.lightning import ProbeCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=world,
        max_epochs=STEPS,
        callbacks=[ProbeCallback(every=1, out=out)],
        **quiet,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(*examples()), batch_size=BATCH // world))


def fit_by_transformers(out, world):
    import transformers
    from accelerate.state import AcceleratorState

    from condzoo.integrations.transformers import ProbeCallback

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x, labels=None):
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Undivided(Module):
        """Takes the items of all processes, by which the Trainer multiplies, and does not divide by them."""

        def forward(self, x, labels=None, **kwargs):
            return super().forward(x, labels)

    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test in one process
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    rows = [{"x": x, "labels": y} for x, y in zip(*examples(), strict=True)]
    for kind, folder, rate in ((Module, out, RATE), (Undivided, f"{out}/undivided", RATE / world)):
        arguments = transformers.TrainingArguments(
            folder,
            use_cpu=True,
            num_train_epochs=STEPS,
            per_device_train_batch_size=BATCH // world,
            optim="sgd",
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            **quiet,
        )
        transformers.Trainer(kind(), arguments, train_dataset=rows, callbacks=[ProbeCallback(every=1)]).train()


FITS = {"lightning": fit_by_lightning, "transformers": fit_by_transformers}


def fit(library, out):
    """The fit in a process that has become one of torchrun's: forked from a test, so that it imports nothing."""
    os.environ["TORCHELASTIC_RUN_ID"] = "fit"  # by which Lightning knows torchrun
    warnings.simplefilter("ignore")  # the libraries' own
    torch.set_num_threads(1)
    FITS[library](out, int(os.environ["WORLD_SIZE"]))
    torch.distributed.destroy_process_group()  # else a process may abort at its exit while the other still talks
