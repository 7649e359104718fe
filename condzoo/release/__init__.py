"""`release`: a checkpoint's folder from finished runs."""

from condzoo.release.making import release, released_before

__all__ = ["release", "released_before"]
