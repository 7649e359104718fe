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
from condzoo.experiments.made import by_this_version, made_here
from condzoo.experiments.schema import InitializationSettings
from condzoo.experiments.stopping import stopping
from condzoo.experiments.training import digest, plain_name, rounded
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
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """lambda_max and kappa_p of every matrix, full and each layer's block, for every network and seed.

    With a folder each network is written there once it is measured. What is there, or in `before`, an earlier call's
    data, is not measured again, if it was by this version of condzoo with the same settings.

    Raises:
        Stopped: on a signal; the same call goes on with the network that was being measured.
    """
    known = known_networks(before or {}, settings)
    asked = settings.model_dump(mode="json")
    found: list[dict[str, Any]] = []
    planned = list(itertools.product(seeds, settings.models))
    with warnings.catch_warnings(), stopping("networks") as stop_where_asked:
        # that a matrix takes minutes; the experiment's file says how many in all
        warnings.filterwarnings("ignore", r"exact (curvature|Hessian): about", UserWarning)
        for number, (seed, label) in enumerate(planned, start=1):
            stop_where_asked()
            if on_event is not None:
                on_event(Message(f"[{number}/{len(planned)}] {label}, seed {seed}"))
            path = None if folder is None else network_file(folder, label, seed)
            kept = {} if path is None else read_kept(path)
            if kept.get("settings") != asked or not by_this_version(kept["made"]):
                kept = known.get((label, seed)) or measured(label, settings, seed, data_root, path)
            found.append(kept)
    return {
        "networks": [each["network"] for each in found],
        "p": settings.p,
        "seconds": sum(each["seconds"] for each in found),
        "made": [each["made"] for each in found],
    }


def known_networks(before: dict[str, Any], settings: InitializationSettings) -> dict[tuple[str, int], dict[str, Any]]:
    """(label, seed) -> what `measured` would return, of an earlier call's data by this version with these settings."""
    if before.get("settings") != digest(settings) or not by_this_version(before["made"]):
        return {}
    share = before["seconds"] / len(before["networks"])  # the data have the seconds of all networks together
    return {
        (network["label"], network["seed"]): {"network": network, "seconds": share, "made": before["made"]}
        for network in before["networks"]
    }


def measured(
    label: str, settings: InitializationSettings, seed: int, data_root: str | Path | None, path: Path | None
) -> dict[str, Any]:
    """One network's row, the seconds it took and on what it was made, written to the path where there is one."""
    began = time.perf_counter()
    row = {"label": label, "seed": seed, "matrices": measure_network(settings.models[label], settings, seed, data_root)}
    seconds = time.perf_counter() - began
    found = {"settings": settings.model_dump(mode="json"), "network": row, "seconds": seconds, "made": made_here()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found, allow_nan=False).encode())
    return found


def network_file(folder: Path, label: str, seed: int) -> Path:
    """Where a network's row is kept."""
    return folder / f"{plain_name(label)}-seed{seed}.json"


def read_kept(path: Path) -> dict[str, Any]:
    """What was written of a network; empty where there is none, or it is damaged, or of before it said on what."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    whole = isinstance(kept, dict) and {"network", "seconds"} <= kept.keys() and isinstance(kept.get("made"), dict)
    return kept if whole else {}


def measure_network(
    name: str, settings: InitializationSettings, seed: int, data_root: str | Path | None
) -> dict[str, dict[str, Any]]:
    """{matrix: {"full": summary, layer: summary, ...}} of one network, in train mode."""
    x, y = first_batch(settings, seed, data_root)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed seeds GPUs, too
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
