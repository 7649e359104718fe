"""Uploading a checkpoint to the Hugging Face Hub, where timm loads it by `hf-hub:owner/arch.tag`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condzoo.checkpoints.folder import SUMS, read_folder
from condzoo.checkpoints.loading import load_folder
from condzoo.models.released import HUB_OWNER


@dataclass(frozen=True)
class Upload:
    """What goes where: `repository` is owner/arch.tag; `done` is False for a dry run."""

    repository: str
    files: tuple[str, ...]
    done: bool


def push(path: str | Path, *, owner: str = HUB_OWNER, dry_run: bool = False, api: Any = None) -> Upload:
    """Upload a checkpoint's folder, after it was read and loaded once more; the token is huggingface_hub's own.

    Args:
        path: the folder.
        owner: user or organization on the Hub.
        dry_run: check and list, upload nothing.
        api: a huggingface_hub.HfApi; None makes one.

    Raises:
        ValueError, FileNotFoundError: not a checkpoint that loads.
        ModuleNotFoundError: huggingface_hub is not installed (the extra `hub`).
        OSError: the upload failed; calling it again uploads what is missing.
    """
    folder = read_folder(Path(path))
    load_folder(folder)
    repository = f"{owner}/{folder.path.resolve().name}"
    files = tuple(sorted((*folder.files, SUMS)))
    if dry_run:
        return Upload(repository, files, done=False)
    if api is None:
        from huggingface_hub import HfApi  # the extra `hub`; nothing else here needs it

        api = HfApi()
    message = f"Release {repository}"
    try:
        api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder.path, allow_patterns=list(files), commit_message=message
        )
    except Exception as error:  # its HTTP client's errors are of many kinds
        raise OSError(f"{folder.path} is made, but could not be uploaded to {repository}: {error}") from error
    return Upload(repository, files, done=True)
