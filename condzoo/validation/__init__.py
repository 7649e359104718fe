"""What the zoo promises of its networks, and whether one keeps it."""

from condzoo.validation.validating import Validation, validate

__all__ = ["Validation", "validate"]
