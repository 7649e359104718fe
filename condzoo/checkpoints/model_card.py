"""README.md of a checkpoint: made from its own files, never written by hand."""

import functools
import json
import math
import re
import statistics
import tomllib
from pathlib import Path

from timm.models import is_model

from condzoo.checkpoints.folder import CONFIG, CONVERSION, METRICS, CheckpointFolder
from condzoo.checkpoints.loading import read_recipe
from condzoo.checkpoints.records import Config, Conversion, InputConfig, Metrics, read_conditioning, read_record
from condzoo.models.released import read_index
from condzoo.probe import Spectrum

STORED = ("imagefolder", "hfds")  # data sets that are whatever lies in the folder
IMAGENET_TEST = 50_000  # images of ImageNet-1k's validation set
PUBLISHED = Path(__file__).with_name("published.toml")


def model_card(folder: CheckpointFolder, own: bool | None = None) -> str:
    """The checkpoint's README.md, with the Hub's front matter.

    Args:
        folder: the checkpoint.
        own: whether it is one of condzoo's own releases, which load by their name; None: what the index says.

    Raises:
        ValueError: a file it is made from is missing or wrong.
    """
    config = read_record(folder, CONFIG, Config)
    name = f"{config.architecture}.{config.pretrained_cfg.tag}"
    record: Metrics | Conversion
    if folder.trained:
        record = read_record(folder, METRICS, Metrics)
        dataset, license = images_of(record), "apache-2.0"
        parts = [results(record), conditioning_section(folder), training(folder, record)]
    else:
        record = read_record(folder, CONVERSION, Conversion)
        dataset, license = "", record.license
        parts = [f"## Origin\nMade from {record.origin}{origin_sum(record)}. {record.note}"]
    head = [front_matter(license, dataset), f"# {name}", opening(config, record.parameters, dataset)]
    own = is_released(name, record) if own is None else own
    return "\n\n".join([*head, usage(name, config, own), preprocessing(config, record), *parts]) + "\n"


def is_released(name: str, record: Metrics | Conversion) -> bool:
    """Whether the package's index has these weights under this name."""
    release = read_index().get(name)
    return release is not None and release.sha256 == record.sha256


def front_matter(license: str, dataset: str) -> str:
    """What the Hub reads of a model card."""
    plain = re.fullmatch(r"[a-z][a-z0-9.-]*", license)  # as the Hub's own names; others need quotes to be YAML
    licensed = f"license: {license if plain else json.dumps(license)}"
    lines = ["library_name: timm", licensed, "pipeline_tag: image-classification"]
    lines += [f"datasets:\n- {dataset}"] if dataset not in ("", *STORED) else []
    return "\n".join(["---", *lines, "tags:\n- condzoo\n- timm", "---"])


def opening(config: Config, parameters: int, dataset: str) -> str:
    """One sentence: what it is."""
    c, h, w = config.pretrained_cfg.input_size
    what = "images in class folders" if dataset in STORED else dataset
    trained = f", trained on {what}" if dataset else ""
    inserted = " with a BatchNorm before its last linear layer" if config.insert_last_bn else ""
    return (
        f"`{config.architecture}`{inserted}{trained}: {parameters:,} parameters, images of {c} x {h} x {w}, "
        f"{config.num_classes} classes. All numbers here can be measured again: `condzoo verify`."
    )


def usage(name: str, config: Config, own: bool) -> str:
    """How to load it from a folder; and one of condzoo's own releases by its name."""
    note = "  # one of condzoo's own releases"
    lines = ["import condzoo", "", f'model = condzoo.load_checkpoint("FOLDER/{name}")  # this folder, in eval mode']
    lines += [f'model = condzoo.load_checkpoint("{name}"){note}'] if own else []
    if is_model(config.architecture) and not config.insert_last_bn:  # of other sizes timm has no entry
        lines += ["", "import timm, condzoo.models", ""]
        lines += [f'model = timm.create_model("local-dir:FOLDER/{name}", pretrained=True)']
        lines += [f'model = timm.create_model("{name}", pretrained=True){note}'] if own else []
    return "\n".join(["## Use", "```python", *lines, "```"])


def preprocessing(config: Config, record: Metrics | Conversion) -> str:
    """How images become the network's input."""
    cfg = config.pretrained_cfg
    steps = []
    if isinstance(record, Metrics):
        steps += [f"centre crop to {record.data['crop']} pixels"] if record.data["crop"] else []
        steps += [f"resize to {record.data['resize']} (bilinear, antialiased)"] if record.data["resize"] else []
        if size := record.data.get("image_size"):
            steps += [f"scale the shorter side to {record.data['eval_resize']} pixels ({cfg.interpolation})"]
            steps += [f"centre crop to {size}"]
    else:
        steps += converted_views(cfg)
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (cfg.mean, cfg.std))
    steps.append(f"scale to [0, 1], subtract {mean}, divide by {std}")
    text = "; ".join(steps).capitalize() + "."
    if isinstance(record, Conversion) and not record.preprocessing_known:
        text = f"Not known: nothing in the source says it. What is usual for this network: {text}"
    return f"## Preprocessing\n{text}"


def converted_views(cfg: InputConfig) -> list[str]:
    """The steps before standardization of a network that timm's config describes, as timm's transforms take them."""
    size = cfg.input_size[1:]
    mode = (cfg.model_extra or {}).get("crop_mode") or "center"
    scaled = [math.floor(pixels / cfg.crop_pct) for pixels in size]
    if mode == "squash":
        resize = f"scale to {scaled[0]} x {scaled[1]} pixels, whatever the image's shape ({cfg.interpolation})"
    elif mode == "border":
        resize = f"scale the longer side to {max(scaled)} pixels and pad the shorter one ({cfg.interpolation})"
    else:
        resize = f"scale the shorter side to {scaled[0]} pixels ({cfg.interpolation})"
    return [resize, f"centre crop to {size[0]} x {size[1]}"]


def percent(share: float) -> str:
    """A share as a percentage with two digits."""
    return f"{100 * share:.2f}"


def error_of(metrics: Metrics) -> str:
    """Test error in % over the seeds: one value, or mean +- standard deviation; how many diverged."""
    errors = [100 * seed.test_error for seed in metrics.seeds if seed.test_error is not None]
    if not errors:
        return "all diverged"
    spread = f" +- {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    lost = len(metrics.seeds) - len(errors)
    return f"{statistics.mean(errors):.2f}{spread}" + (f" ({lost} diverged)" if lost else "")


def results(metrics: Metrics) -> str:
    """Test error of every seed, of the released weights, and what was published."""
    released = percent(1 - metrics.test_correct / metrics.test_images)
    lines = [
        "## Results",
        f"Test error {error_of(metrics)} % (n = {len(metrics.seeds)}, last epoch). The released weights, seed "
        f"{metrics.released_seed} ({metrics.rule}), measured in float32: {metrics.test_correct:,} of "
        f"{metrics.test_images:,} images right, {released} % error.",
        "",
        "| seed | test error, % | training loss | epochs | precision | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for s in metrics.seeds:
        error = s.status if s.test_error is None else percent(s.test_error)
        loss = "-" if s.train_loss is None else f"{s.train_loss:.4f}"
        lines.append(f"| {s.seed} | {error} | {loss} | {s.epochs:g} | {s.precision} | {s.seconds / 60:.1f} |")
    published = published_errors(images_of(metrics), metrics.model)
    beside = "; ".join(f"{source}: {error}" for source, error in published.items())
    lines += [
        "",
        f"Published, %: {beside}." if beside else "No published error for this network and data is known to us.",
    ]
    return "\n".join(lines)


def images_of(metrics: Metrics) -> str:
    """The data set as published results call it: class folders with as many test images as ImageNet's are ImageNet."""
    name = str(metrics.data["name"])
    return "imagenet" if name in STORED and metrics.test_images == IMAGENET_TEST else name


@functools.cache
def read_published() -> dict[str, dict[str, dict[str, str]]]:
    """Published errors by data set and model."""
    return tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))


def published_errors(dataset: str, model: str) -> dict[str, str]:
    """Source -> published test error in %, of a model on a data set; without one, of its twin without last BN."""
    known = read_published().get(dataset, {})
    if model in known or not model.endswith("_lastbn"):
        return known.get(model, {})
    plain = known.get(model.removesuffix("_lastbn"), {})
    return {f"{source}, without last BN": error for source, error in plain.items()}


def kappa(s: Spectrum, p: float) -> str:
    """A condition number for a table; with its status where it is not a plain number."""
    value, status = s.condition_number(p), s.status(p)
    return f"{value:.3g}" if status == "ok" else f"{value:.3g} ({status})"


def conditioning_section(folder: CheckpointFolder) -> str:
    """The last layer's input, at initialization and at the end."""
    records = read_conditioning(folder)
    end = records["at_end"]
    lines = [
        "## Conditioning",
        f"Input of the last layer, measured on {end.samples:,} training images in {end.mode} mode, {end.dtype} "
        "(every layer: conditioning.json):",
        "",
        "| | lambda_max | kappa at p = 0.5 | kappa at p = 1 |",
        "|---|---|---|---|",
    ]
    for when, record in (("at initialization", records["at_init"]), ("at the end", end)):
        s = record.last.input
        lines.append(f"| {when} | {s.lambda_max:.4g} | {kappa(s, 0.5)} | {kappa(s, 1.0)} |")
    return "\n".join([*lines, "", "![conditioning of every layer while training](conditioning.png)"])


def training(folder: CheckpointFolder, metrics: Metrics) -> str:
    """Recipe, source, departures, hardware, time, date."""
    hours = sum(seed.seconds for seed in metrics.seeds) / 3600
    versions = ", ".join(f"{name} {version}" for name, version in metrics.packages.items() if version)
    command = f"`condzoo train {metrics.recipe}`" if metrics.recipe else "`condzoo train recipe.toml`"
    optim = read_recipe(folder).get("optim", {})
    lines = [
        "## Training",
        f"{command} (recipe.toml is the recipe as resolved; {optim.get('name')}, lr {optim.get('lr')}).",
        f"- Source: {metrics.source}",
        f"- Departs: {metrics.departs}",
        f"- Hardware: {metrics.hardware}; {hours:.2f} hours for all seeds; finished {metrics.date}",
        f"- Software: {versions}" + (f"; commit {metrics.commit}" if metrics.commit else ""),
    ]
    return "\n".join(lines)


def origin_sum(conversion: Conversion) -> str:
    """The origin's SHA-256, where it was a file."""
    return f" (SHA-256 {conversion.origin_sha256})" if conversion.origin_sha256 else ""
