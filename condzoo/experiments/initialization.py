"""Experiments at initialization: exact curvature of small networks, whole and layer by layer."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.data import BatchPlan, load_data
from condzoo.experiments.schema import InitializationSettings
from condzoo.experiments.training import rounded
from condzoo.models import create_model
from condzoo.probe import Spectrum, curvature


def collect_initialization(
    settings: InitializationSettings, seeds: list[int], data_root: str | Path | None = None
) -> dict[str, Any]:
    """lambda_max and kappa_p of every matrix, full and each layer's block, for every network and seed."""
    began = time.perf_counter()
    with warnings.catch_warnings():  # that a matrix takes minutes; the experiment's file says how many in all
        warnings.filterwarnings("ignore", r"exact (curvature|Hessian): about", UserWarning)
        rows = [
            {"label": label, "seed": seed, "matrices": measure_network(name, settings, seed, data_root)}
            for seed in seeds
            for label, name in settings.models.items()
        ]
    return {"networks": rows, "p": settings.p, "seconds": time.perf_counter() - began}


def measure_network(
    name: str, settings: InitializationSettings, seed: int, data_root: str | Path | None
) -> dict[str, dict[str, Any]]:
    """{matrix: {"full": summary, layer: summary, ...}} of one network, in train mode."""
    x, y = first_batch(settings, seed, data_root)
    torch.manual_seed(seed)
    model = create_model(name, init=settings.init, input_size=tuple(x.shape[1:])).train()
    layers = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        matrix: {
            block or "full": summarized(curvature(model, x, y, matrix, block, seed=seed), settings.p)
            for block in (None, *layers)
        }
        for matrix in settings.matrices
    }


def first_batch(settings: InitializationSettings, seed: int, data_root: str | Path | None) -> tuple[Tensor, Tensor]:
    """`settings.examples` training images, drawn with the seed: x [N, C, H, W], y [N]."""
    fields = dict(settings.data)
    data = load_data(fields.pop("name"), data_root, **fields)
    return next(iter(data.train_batches(BatchPlan(settings.examples, seed=seed), epoch=0)))


def summarized(spectrum: Spectrum, p: list[float]) -> dict[str, Any]:
    """What is kept of a spectrum; kappa is None where it is not known."""
    return {
        "lambda_max": rounded(spectrum.lambda_max),
        "kappa": {f"{q:g}": rounded(spectrum.condition_number(q)) for q in p},
        "dim": spectrum.dim,
        "rank": spectrum.rank,
        "negative": int((spectrum.eigenvalues < -spectrum.noise_floor).sum()),
    }
