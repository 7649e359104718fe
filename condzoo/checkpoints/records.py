"""What a checkpoint's JSON files hold, as strict schemas: a wrong type or value is an error that names its field."""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from condzoo.checkpoints.folder import CONDITIONING, CheckpointFolder
from condzoo.probe import Conditioning
from condzoo.probe.serialization import from_record, strict_json

LARGEST_SIDE = 4096
Pixels = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]  # a size that is tried out must fit into memory
LARGEST_INPUT = 2**24  # values, of four channels at least: each pixel has the activations of a first layer, too
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]
# arguments a config may pass to a model beside num_classes: sizes and switches, never something that names a file
Argument = Literal[
    "in_chans",
    "input_size",
    "img_size",
    "global_pool",
    "drop_rate",
    "bias",
    "norm",
    "last_bn_init",
    "projection",
]


class Record(BaseModel):
    """Strict: no conversion between types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class InputConfig(BaseModel):
    """timm's `pretrained_cfg`: how images are prepared. Fields of timm's that are not used here may stand beside."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    tag: str
    input_size: tuple[Pixels, Pixels, Pixels]
    num_classes: int
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    crop_pct: Positive
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]

    @model_validator(mode="after")
    def check_channels(self) -> "InputConfig":
        """One mean and one std for all channels, or one each, as timm takes them."""
        channels = self.input_size[0]
        if not {len(self.mean), len(self.std)} <= {1, channels}:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} stds for images of {channels} channels")
        return self

    @model_validator(mode="after")
    def check_test_size(self) -> "InputConfig":
        """The size and crop that timm evaluates at, where it has others, are a size and a crop."""
        extra = self.model_extra or {}
        size, crop = extra.get("test_input_size"), extra.get("test_crop_pct")
        sizes = list(size) if isinstance(size, list | tuple) else []
        whole = all(type(n) is int and 1 <= n <= LARGEST_SIDE for n in sizes)
        if size is not None and not (whole and len(sizes) == 3 and sizes[0] == self.input_size[0]):
            raise ValueError(f"test_input_size must be {self.input_size[0]} channels, height and width, got {size!r}")
        if crop is not None and not (isinstance(crop, int | float) and 0 < crop < math.inf):
            raise ValueError(f"test_crop_pct must be a number above 0, got {crop!r}")
        return self


class Config(BaseModel):
    """config.json, in timm's layout. `insert_last_bn`: the network is timm's own with a last BN put in."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    architecture: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    num_classes: int = Field(ge=1)
    num_features: int | None = None
    model_args: dict[Argument, Any] = {}
    insert_last_bn: bool = False
    pretrained_cfg: InputConfig


class Expected(Record):
    """expected.json: logits of the input that `fixed_input` makes."""

    shape: tuple[Annotated[int, Field(ge=1, le=8)], Pixels, Pixels, Pixels]
    logits: list[list[Finite]]

    @model_validator(mode="after")
    def check_size(self) -> "Expected":
        """No more than can be tried out: files that agree with each other may be anyone's."""
        images, channels, height, width = self.shape
        if images * height * width * max(channels, 4) > LARGEST_INPUT:
            raise ValueError(f"shape {self.shape} is too large to try out; two images of 3 x 1400 x 1400 are not")
        return self


class SeedResult(Record):
    """One training: its last epoch. `test_error` is a share of the test images, None where it diverged."""

    seed: int
    status: str
    test_error: Annotated[Finite, Field(ge=0, le=1)] | None
    train_loss: Finite | None
    epochs: Finite
    steps: int
    seconds: Finite
    precision: str


class Metrics(Record):
    """metrics.json: every seed trained, and the released weights evaluated in float32.

    Attributes:
        sha256: of model.safetensors. rule: how `released_seed` was chosen.
        recipe: the repository's recipe by name, None for another; `source` and `departs` are from its header.
        data: data set, and how its images were prepared.
        commit: of the source (each, where the run went on at another); None for an installed package.
    """

    model: str
    tag: str
    sha256: str
    parameters: int
    released_seed: int
    rule: str
    test_correct: int = Field(ge=0)
    test_images: int = Field(ge=1)
    seeds: list[SeedResult]
    recipe: str | None
    source: str
    departs: str
    data: dict[str, str | int | None]
    hardware: str
    packages: dict[str, str | None]
    commit: str | None
    date: str


class Conversion(Record):
    """conversion.json: what the weights were made from.

    Attributes:
        note: what was done to them.
        preprocessing_known: False where nothing says how their images were prepared, and config.json has what is usual
            for the network. Folders of before it was asked for do not have it.
        condzoo: the version that made it; None of one that did not say.
    """

    model: str
    tag: str
    sha256: str
    parameters: int
    origin: str
    origin_sha256: str | None
    note: str
    license: str
    preprocessing_known: bool = True
    condzoo: str | None = None


AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def read_record(folder: CheckpointFolder, name: str, schema: type[AnyRecord]) -> AnyRecord:
    """One of the folder's JSON files.

    Raises:
        ValueError: not there, not JSON, or a field that is wrong; names the file and the field.
    """
    try:
        return schema.model_validate_json(folder.text(name), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{folder.source(name)}: {field}: {first['msg']}") from error


def read_conditioning(folder: CheckpointFolder) -> dict[str, Conditioning]:
    """The records of conditioning.json, at initialization (`at_init`) and at the end (`at_end`).

    Raises:
        ValueError: the file is not such a pair, or one of them has no layer or no table of those skipped.
    """
    try:
        records = strict_json(folder.text(CONDITIONING))
        found = {when: from_record(records[when]) for when in ("at_init", "at_end")}
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:  # torch.tensor's, too
        raise ValueError(f"{folder.source(CONDITIONING)} lacks a record: {error}") from error
    for when, record in found.items():
        if not record.layers:
            raise ValueError(f"{folder.source(CONDITIONING)}: {when} has no layers")
        if not isinstance(record.skipped, dict):
            raise ValueError(f"{folder.source(CONDITIONING)}: {when}: skipped is no table of layers and reasons")
    return found
