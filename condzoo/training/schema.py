"""The fields of a recipe: strict, complete, and what `condzoo recipes --schema` documents.

A recipe is data; this module holds what its fields are called, which values they take and what they
mean. What must agree across fields is in `consistency.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_number(value: Any) -> Any:
    """A literal `true` would accept the number 1."""
    if isinstance(value, bool | str):
        return value
    raise PydanticCustomError("literal_error", "wrong type", {"expected": "True, False or 'auto'"})


# Far beyond any use: what is computed of them is still a number, in float32 that of the weights.
LARGEST = 1e30  # of a learning rate, and of its factors
MOST_DECAY = 1e6  # times the largest learning rate
MOST_EPOCHS, MOST_STEPS = 10**9, 10**12
MOST_IMAGES, MOST_PIXELS = 10**9, 10**5  # of a batch; a side of an image

Share = Annotated[float, Field(gt=0, lt=1)]
Switch = Annotated[Literal[True, False, "auto"], BeforeValidator(_no_number)]


class Section(BaseModel):
    """A table of a recipe: unknown fields, other types and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The network; the number of classes and the images' shape follow the data."""

    name: str = Field(description="any name that condzoo.create_model builds")
    init: str | None = Field(None, description="initializer in place of the family's own (condzoo.init_weights)")
    last_bn_init: str | None = Field(None, description="gamma of the last BN: ones or uniform")
    drop_rate: float | None = Field(None, ge=0, lt=1, description="dropout before the classifier")
    args: dict[str, Any] = Field(default_factory=dict, description="further arguments of the network")


class DataSection(Section):
    """The images, how they are prepared, and how batches are made of them."""

    name: str = Field(description="digits, mnist, fashion_mnist, cifar10, cifar100, imagefolder or hfds")
    batch_size: int = Field(gt=0, le=MOST_IMAGES, description="images in a batch, over all processes")
    augment: Literal["none", "paper", "standard", "alternating"] = Field(
        "none", description="see condzoo.data.augment, and condzoo.data.views for imagefolder and hfds"
    )
    cutout: int | None = Field(
        None, gt=0, description="pixels a side of the square cut out of each training image: condzoo.data.augment"
    )
    validation: float | None = Field(
        None,
        gt=0,
        description="share (under 1) or number of training images held out, the same share of each class, the same for "
        "every seed; they are evaluated (val_*) as the run goes on, and the test images at its end only",
    )
    drop_last: bool = Field(True, description="leave the last, incomplete training batch of an epoch out")
    crop: int | None = Field(None, gt=0, description="in memory: centre crop to this many pixels a side")
    resize: int | None = Field(
        None, gt=0, le=MOST_PIXELS, description="in memory: then resize to this many a side, antialiased"
    )
    image_size: int | None = Field(
        None, gt=0, le=MOST_PIXELS, description="imagefolder, hfds: pixels a side of a view; default: 224"
    )
    eval_resize: int | None = Field(
        None,
        gt=0,
        le=MOST_PIXELS,
        description="imagefolder, hfds: shorter side before evaluation's centre crop; default: image_size / 0.875",
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(
        None, description="imagefolder, hfds: default bilinear"
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="imagefolder, hfds: processes that decode; default: a core each, of those that torchrun's "
        "processes share, at most 8; they change no result",
    )
    num_classes: int | None = Field(
        None, gt=0, description="imagefolder: how many class folders there must be; default: as many as there are"
    )
    dataset: str | None = Field(
        None, description="hfds: a folder that Hugging Face datasets reads, or with download a name on the Hub"
    )
    root: str | None = Field(
        None,
        description="the data root (of train/ and val/, for imagefolder; the cache of `datasets`, for hfds); default: "
        "CONDZOO_DATA, then the user's cache",
    )
    download: bool = Field(False, description="let torchvision, or the Hub, fetch a missing set")


class Sgd(Section):
    """Stochastic gradient descent, as torch.optim.SGD."""

    name: Literal["sgd"]
    lr: float = Field(gt=0, le=LARGEST, description="learning rate, before the schedule")
    momentum: float = Field(0.0, ge=0, lt=1, description="as torch.optim.SGD's, without dampening")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: float = Field(0.0, ge=0, le=MOST_DECAY, description="added to the gradient as weight_decay * weight")
    decay_norm: bool = Field(True, description="false spares norms and biases (every 1-D parameter)")


class FullBatch(Sgd):
    """Gradient descent on the whole training set, a step an epoch, in chunks of data.batch_size."""

    name: Literal["gd"]  # type: ignore[assignment]


class Adam(Section):
    """Adam, as torch.optim.Adam."""

    name: Literal["adam"]
    lr: float = Field(gt=0, le=LARGEST, description="learning rate, before the schedule")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="decay of the first and second moment"
    )
    eps: float = Field(1e-8, gt=0, le=LARGEST, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, le=MOST_DECAY, description="added to the gradient as weight_decay * weight")
    decay_norm: bool = Field(True, description="false spares norms and biases (every 1-D parameter)")


class AdamW(Adam):
    """Adam with decoupled weight decay, as torch.optim.AdamW."""

    name: Literal["adamw"]  # type: ignore[assignment]
    weight_decay: float = Field(0.0, ge=0, le=MOST_DECAY, description="the weights shrink by lr * weight_decay a step")


class Constant(Section):
    """The learning rate stays, also without [schedule], after a warm-up of n steps: lr / n, 2 lr / n, ... lr."""

    name: Literal["constant"]
    warmup_epochs: float = Field(0.0, ge=0, le=MOST_EPOCHS, description="epochs of linear warm-up")
    warmup_iterations: int = Field(0, ge=0, le=MOST_STEPS, description="steps of linear warm-up, in place of epochs")


class Step(Constant):
    """The learning rate is multiplied by gamma at each milestone."""

    name: Literal["step"]  # type: ignore[assignment]
    milestones: list[Annotated[int, Field(gt=0, le=MOST_STEPS)]] = Field(description="ascending, counted from 0")
    unit: Literal["epoch", "iteration"] = Field("epoch", description="what the milestones count")
    gamma: float = Field(0.1, gt=0, le=LARGEST, description="factor at each milestone")
    reset_momentum: bool = Field(False, description="forget the optimizer's state at each milestone")


class Cosine(Constant):
    """Half a cosine from lr to min_lr over the run, after the warm-up."""

    name: Literal["cosine"]  # type: ignore[assignment]
    min_lr: float = Field(0.0, ge=0, le=LARGEST, description="the learning rate at the end")


class OneCycle(Section):
    """Up to lr and down again, as torch.optim.lr_scheduler.OneCycleLR without its momentum cycle."""

    name: Literal["onecycle"]
    pct_start: Share = Field(0.3, description="share of the run spent going up")
    div_factor: float = Field(25.0, ge=1, description="the run starts at lr / div_factor")
    final_div_factor: float = Field(1e4, ge=1, description="and ends at lr / div_factor / final_div_factor")
    anneal: Literal["cos", "linear"] = Field("cos", description="shape of both ways")


class LossSection(Section):
    """Cross-entropy, computed in float32."""

    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the target spread over all classes; train_loss has it, val_loss and test_loss do not",
    )


class ProbeSection(Section):
    """What the probe measures while the network trains (condzoo.Probe)."""

    every: int = Field(0, ge=0, description="steps between measurements; 0 is off")
    conv: Literal["channels", "patches"] = Field("channels", description="what a row of a convolution is")
    layers: list[str] | None = Field(None, description="names or patterns of the layers; default: all")
    precision: Literal["auto", "fast", "float64"] = Field("auto", description="of the moments' products")
    bias: bool = Field(False, description="the bias as a constant input of its layer")
    kappa: bool = Field(True, description="full spectra; false: lambda_max alone, which is cheaper")
    neurons: bool = Field(True, description="count dying and full units of ReLUs")
    weights: bool = Field(True, description="norms of the weights and of their gradients")


Optimizer = Annotated[Sgd | FullBatch | Adam | AdamW, Field(discriminator="name")]
Schedule = Annotated[Constant | Step | Cosine | OneCycle, Field(discriminator="name")]


class Recipe(Section):
    """A training, complete: everything that decides its result but the data and the hardware."""

    epochs: int | None = Field(None, gt=0, le=MOST_EPOCHS, description="passes over the training set; or iterations")
    iterations: int | None = Field(None, gt=0, le=MOST_STEPS, description="optimizer steps; or epochs")
    seed: int = Field(0, ge=0, lt=2**63, description="of initialization, order, augmentation and dropout")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of forward and backward")
    channels_last: Switch = Field("auto", description="memory format; auto: for convolutions")
    compile: bool = Field(False, description="torch.compile the network")
    sync_bn: bool = Field(False, description="BatchNorm over the global batch of all GPUs, not each process's own")
    ema: Share | None = Field(None, description="decay of an average of the weights, which is evaluated")
    grad_clip: float | None = Field(None, gt=0, le=LARGEST, description="largest norm of the whole gradient")
    accumulate: int = Field(1, gt=0, le=MOST_IMAGES, description="parts a batch is processed in, one after the other")
    freeze: list[str] = Field([], description="patterns (fnmatch) of parameters that are not updated")
    eval_every: int = Field(1, ge=0, description="epochs between evaluations; the last epoch always is; 0: never")
    save_every: float = Field(1.0, gt=0, le=MOST_EPOCHS, description="epochs (or a part of one) between checkpoints")
    log_every: int = Field(50, gt=0, description="steps between lines of metrics.jsonl")
    on_divergence: Literal["stop", "record"] = Field("stop", description="record: diverging is a result")
    model: ModelSection
    data: DataSection
    optim: Optimizer
    schedule: Schedule = Constant(name="constant")
    loss: LossSection = LossSection()
    probe: ProbeSection = ProbeSection()
