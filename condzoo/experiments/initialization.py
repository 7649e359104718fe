"""Experiments at initialization: exact curvature of small networks, whole and layer by layer."""

import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condzoo.data import BatchPlan, load_data
from condzoo.experiments.schema import InitializationSettings
from condzoo.experiments.stopping import stopping
from condzoo.experiments.training import plain_name, rounded
from condzoo.models import create_model
from condzoo.probe import Spectrum, curvature_blocks
from condzoo.training.events import Message, OnEvent
from condzoo.training.run_directory import write_atomically


def collect_initialization(
    settings: InitializationSettings,
    seeds: list[int],
    data_root: str | Path | None = None,
    folder: Path | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """lambda_max and kappa_p of every matrix, full and each layer's block, for every network and seed.

    With a folder each network is written there once it is measured, and not measured again.

    Raises:
        Stopped: on a signal; the same call goes on with the network that was being measured.
    """
    rows: list[dict[str, Any]] = []
    seconds = 0.0
    planned = list(itertools.product(seeds, settings.models))
    with warnings.catch_warnings(), stopping("networks") as stop_where_asked:
        # that a matrix takes minutes; the experiment's file says how many in all
        warnings.filterwarnings("ignore", r"exact (curvature|Hessian): about", UserWarning)
        for number, (seed, label) in enumerate(planned, start=1):
            stop_where_asked()
            if on_event is not None:
                on_event(Message(f"[{number}/{len(planned)}] {label}, seed {seed}"))
            row, spent = measured_once(label, settings, seed, data_root, folder)
            rows.append(row)
            seconds += spent
    return {"networks": rows, "p": settings.p, "seconds": seconds}


def measured_once(
    label: str, settings: InitializationSettings, seed: int, data_root: str | Path | None, folder: Path | None
) -> tuple[dict[str, Any], float]:
    """One network's row and the seconds it took; from the folder where it was measured with the same settings."""
    path = None if folder is None else folder / f"{plain_name(label)}-seed{seed}.json"
    asked = settings.model_dump(mode="json")
    if path is not None and path.exists():
        kept = read_kept(path)
        if kept.get("settings") == asked:
            return kept["network"], kept["seconds"]
    began = time.perf_counter()
    row = {"label": label, "seed": seed, "matrices": measure_network(settings.models[label], settings, seed, data_root)}
    seconds = time.perf_counter() - began
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"settings": asked, "network": row, "seconds": seconds}
        write_atomically(path, json.dumps(kept, allow_nan=False).encode())
    return row, seconds


def read_kept(path: Path) -> dict[str, Any]:
    """What was written of a network; empty where the file is damaged: it is measured again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return kept if isinstance(kept, dict) and {"network", "seconds"} <= kept.keys() else {}


def measure_network(
    name: str, settings: InitializationSettings, seed: int, data_root: str | Path | None
) -> dict[str, dict[str, Any]]:
    """{matrix: {"full": summary, layer: summary, ...}} of one network, in train mode."""
    x, y = first_batch(settings, seed, data_root)
    torch.manual_seed(seed)
    model = create_model(name, init=settings.init, input_size=tuple(x.shape[1:])).train()
    return {
        matrix: {
            block or "full": summarized(spectrum, settings.p)
            for block, spectrum in curvature_blocks(model, x, y, matrix, seed=seed).items()
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
