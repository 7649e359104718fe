"""Released checkpoints: loading them by name or path, and checking all that they claim."""

from condzoo.checkpoints.loading import list_checkpoints, load_checkpoint
from condzoo.checkpoints.verification import Check, Verification, verify_checkpoint, verify_released

__all__ = ["Check", "Verification", "list_checkpoints", "load_checkpoint", "verify_checkpoint", "verify_released"]
