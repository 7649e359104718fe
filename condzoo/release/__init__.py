"""`release`: a checkpoint's folder from finished runs."""

from condzoo.release.making import is_listed, release, released_before

__all__ = ["is_listed", "release", "released_before"]
