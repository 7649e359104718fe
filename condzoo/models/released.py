"""Which checkpoints are released, where they lie, and reading one by its name, checked.

released.toml is the index: its hash decides what is loaded by a name, wherever the file was found.
"""

import contextlib
import difflib
import functools
import os
import re
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from condzoo.models.weight_files import parse_weights, read_plain_file, sha256

NUMBERS = re.compile(r"\d+")
PACKAGE = Path(__file__).parents[1]
INDEX = Path(__file__).with_name("released.toml")
WEIGHTS = "model.safetensors"
PLAIN = ("README.md", "SHA256SUMS")
CACHE_VARIABLE = "CONDZOO_CACHE"
HUB_OWNER = "condzoo"  # a checkpoint is the Hub's repository HUB_OWNER/arch.tag, laid out as timm's are


@dataclass(frozen=True)
class Release:
    """One row of the index. `name` is arch.tag; `input` replaces fields of the model's input description."""

    name: str
    sha256: str
    default: bool
    input: dict[str, Any]

    @property
    def arch(self) -> str:
        """The model's name."""
        return self.name.split(".", 1)[0]

    @property
    def tag(self) -> str:
        """What tells a model's releases apart."""
        return self.name.split(".", 1)[1]


def read_index() -> dict[str, Release]:
    """Every release by its name, a model's default first among its own."""
    return parse_index(INDEX.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=4)
def parse_index(text: str) -> dict[str, Release]:
    """The rows of an index's text."""
    releases = []
    for name, row in tomllib.loads(text).items():
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}  # as timm's
        releases.append(Release(name, fields.pop("sha256"), fields.pop("default", False), fields))
    return {release.name: release for release in sorted(releases, key=lambda r: (r.arch, not r.default))}


def releases_of(arch: str) -> list[Release]:
    """A model's releases, the default first."""
    return [release for release in read_index().values() if release.arch == arch]


def find_release(arch: str, tag: str | None) -> Release:
    """The release of a model by its tag; None or "" is the default.

    Raises:
        ValueError: no such release; says what there is, or what makes one.
    """
    known = releases_of(arch)
    if not known:
        raise ValueError(f"no weights are released for {arch} yet; {how_to_get(arch)}")
    if not tag:
        return known[0]
    for release in known:
        if release.tag == tag:
            return release
    close = difflib.get_close_matches(tag, [r.tag for r in known], n=1)
    hint = f"did you mean {arch}.{close[0]}? " if close else ""
    raise ValueError(f"unknown tag {tag!r} of {arch}; {hint}released: {', '.join(r.name for r in known)}")


def how_to_get(arch: str) -> str:
    """The commands that make weights for a model: its recipe, or that of another size; timm's own plus a last BN."""
    ways = []
    recipes = recipes_by_model()
    alike = [model for model in recipes if NUMBERS.sub("#", model) == NUMBERS.sub("#", arch)]  # in all but its size
    if arch in recipes:
        ways.append(f"`condzoo train {recipes[arch]}` trains it")
    elif alike:
        ways.append(f"`condzoo train {recipes[alike[0]]} --set model.name={arch}` trains it")
    plain = arch.removesuffix("_lastbn")
    if plain != arch and plain.startswith("resnet"):
        ways.append(
            f"`condzoo convert --last-bn timm/{plain} --calibrate IMAGES` makes a checkpoint of timm's {plain}, "
            f"which `condzoo.load_checkpoint('converted/{arch}.converted')` loads"
        )
    return ", ".join(ways) if ways else "condzoo.list_models(pretrained=True) lists what is released"


def recipes_by_model() -> dict[str, str]:
    """Model -> the recipe that trains it, by name; of several the one in the outermost folder."""
    folder = PACKAGE / "_recipes" if (PACKAGE / "_recipes").is_dir() else PACKAGE.parent / "recipes"
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.toml"), key=lambda path: (len(path.parts), path)):
        with contextlib.suppress(tomllib.TOMLDecodeError):  # a broken recipe is no reason to say less here
            tables, name = tomllib.loads(path.read_text(encoding="utf-8")), path.relative_to(folder).with_suffix("")
            found.setdefault(tables.get("model", {}).get("name", ""), name.as_posix())
            for variant, changes in tables.get("variants", {}).items():
                found.setdefault(changes.get("model.name", ""), name.with_name(variant).as_posix())
    return found


def checkpoint_folders() -> list[Path]:
    """Where released checkpoints are looked for, in this order: the repository, the installed package, the cache."""
    return [PACKAGE.parent / "checkpoints", PACKAGE / "_checkpoints", cache_folder()]


def cache_folder() -> Path:
    """CONDZOO_CACHE/checkpoints, else condzoo/checkpoints in the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    # os.path's, which leaves the ~ of a user without a home in place, where Path's raises
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(os.environ[CACHE_VARIABLE])) / "checkpoints"
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "condzoo" / "checkpoints"


def find_folder(release: Release) -> Path | None:
    """The folder that holds a release here, or None."""
    for place in places(release):
        if os.path.isfile(place):  # Path's raises where the cache cannot be looked into, and every import asks
            return place.parent
    return None


def places(release: Release) -> list[Path]:
    """The files that are looked for under a release's name, in this order."""
    return [folder / release.name / WEIGHTS for folder in checkpoint_folders()]


def weights_path(release: Release) -> Path:
    """The file of a release: where it is, or where it will be once fetched."""
    return (find_folder(release) or cache_folder() / release.name) / WEIGHTS


def read_release(release: Release) -> dict[str, Tensor]:
    """The weights of a release, fetched from the Hub where they are nowhere here.

    Raises:
        FileNotFoundError: not here, and the Hub did not have it or could not be reached.
        ValueError: not the file that was released (its SHA-256 differs from the index's).
    """
    path = release_folder(release) / WEIGHTS
    content = read_plain_file(Path(os.path.realpath(path)))  # some installers make a package's files links
    check_released(release, content, path)
    return parse_weights(content, str(path))


def release_folder(release: Release) -> Path:
    """The folder of a release, fetched from the Hub where it is nowhere here.

    Raises:
        FileNotFoundError, ValueError: as `fetch`.
    """
    return find_folder(release) or fetch(release)


def check_released(release: Release, content: bytes, path: Path) -> None:
    """ValueError unless a file's content is the weights that the index has under the release's name."""
    if sha256(content) != release.sha256:
        raise ValueError(
            f"{path} is not the file released as {release.name}: its SHA-256 is {sha256(content)[:12]}..., "
            f"released was {release.sha256[:12]}...; delete it and get it again"
        )


def fetch(release: Release) -> Path:
    """Download a release's folder into the cache; it gets its name there only once the weights' hash is right.

    One process at a time: those that waited find it there.

    Raises:
        FileNotFoundError: huggingface_hub is not there, the Hub cannot be reached, or has no such repository.
        ValueError: the weights' SHA-256 is not the index's.
        OSError: nothing can be written into the cache.
    """
    cache = cache_folder()
    lock = FileLock(cache.with_suffix(".lock"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        reason = f"{error.strerror}: {release.name} is not here and cannot be fetched into the cache"
        raise OSError(error.errno, f"{reason}; name another by {CACHE_VARIABLE}", str(cache)) from error
    try:
        return find_folder(release) or fetch_into(cache, release)
    finally:
        lock.release()


def fetch_into(cache: Path, release: Release) -> Path:
    """`fetch`, with the cache's lock held."""
    target = cache / release.name
    with tempfile.TemporaryDirectory(prefix=".", dir=cache) as temporary:
        folder = Path(temporary) / release.name
        try:
            download(f"{HUB_OWNER}/{release.name}", folder)
            content = read_plain_file(folder / WEIGHTS)
        except Exception as error:  # the Hub's client raises many kinds, its HTTP library's too
            looked = ", ".join(str(folder) for folder in checkpoint_folders())
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileNotFoundError(
                f"{release.name} is in none of {looked}, and the Hub did not give it: {reason}; the repository has it: "
                f"{CACHE_VARIABLE}=CLONE, the path of a clone, takes it from there"
            ) from error
        if sha256(content) != release.sha256:
            raise ValueError(f"the Hub's {release.name} is not the released file: its SHA-256 differs; not kept")
        shutil.rmtree(target, ignore_errors=True)  # what is there has no weights
        folder.rename(target)
    return target


def download(repository: str, folder: Path) -> None:
    """The files of a repository of the Hub, into a folder. Tests put a stand-in in its place."""
    from huggingface_hub import snapshot_download  # the extra `hub`

    snapshot_download(
        repository, local_dir=folder, allow_patterns=["*.safetensors", "*.json", "*.toml", "*.png", *PLAIN]
    )
