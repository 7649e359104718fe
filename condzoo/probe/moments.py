"""Second moments, summed over batches of any number and size in memory that does not grow.

Not centred: Sigma = (1 / R) sum_r x_r x_r^T over R rows. While there are fewer rows than coordinates
the rows themselves are kept, and the smaller Gram side is decomposed. What would outgrow `LIMIT` all the same is
dropped: a vocabulary has 100,000 coordinates.
Shapes: b pieces, g groups, d coordinates a group, k rows a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from condzoo.probe import arithmetic, native, rounding
from condzoo.probe.arithmetic import Precision
from condzoo.probe.products import Product, look_at, product_of

LIMIT = 1 << 28  # float64 numbers that one moment may keep: 2 GB

Once = Callable[[Callable[[], Product]], Product]


def input_moment(x: Float[Tensor, "n d *hw"]) -> Float[Tensor, "d d"]:
    """Input second moment Sigma_x = E[x x^T], not centred, in float64.

    Args:
        x: layer inputs: [n, d] (Linear) or [n, c, h, w] (Conv2d, every position is a row).

    Returns:
        [d, d], in units of the input squared: the mean over n (times h * w) rows.

    Raises:
        ValueError: no rows.

    Source: arXiv:2002.10801, sec. 3.
    """
    if not x.numel():
        raise ValueError(f"x has no rows: shape {list(x.shape)}")
    columns = x.detach().flatten(2) if x.ndim > 2 else x.detach()[:, :, None]
    with arithmetic.plain_products(x.device.type):
        return arithmetic.gram_float64(columns[:, None])[0] / (columns.shape[0] * columns.shape[2])


def output_grad_moment(grad_h: Float[Tensor, "n d *hw"]) -> Float[Tensor, "d d"]:
    """Output-gradient second moment Sigma_grad_h = E[g g^T], g = n * dL/dh, in float64.

    Args:
        grad_h: gradient of the batch-*mean* loss w.r.t. the layer output, as autograd gives
            it: [n, d] (Linear) or [n, c, h, w] (Conv2d).

    Returns:
        [d, d], in (loss / output)^2. Autograd's factor 1/n is undone, so the value does not
        shrink as the batch grows; for Conv2d it is the mean over all n*h*w positions.

    Raises:
        ValueError: fewer than two samples.

    With BatchNorm in training mode samples interact: row i is n * dL/dh_i, which is not the
    gradient of sample i's own loss.

    Source: arXiv:2002.10801. For Conv2d the authors' code is larger by (h*w)^2: it multiplies
    by n*h*w where this divides. Condition numbers agree.
    """
    samples = grad_h.shape[0]
    if samples < 2:
        raise ValueError(f"an output-gradient moment needs two samples or more, got {samples}")
    return input_moment(grad_h) * samples**2


@dataclass(eq=False)
class RunningMoment:
    """Sum of x x^T over the rows seen so far.

    Attributes:
        total: [g, d, d] float64 sum, None until there are as many vectors as coordinates.
        pending: the vectors themselves ([g, d, k], scaled) while there are fewer.
        rows: what the sum is divided by; vectors: how many it has (more, if classes are summed).
        noise: floor of the sum from float32 products; dtype: the coarsest dtype of the data.
        finite: False once NaN or Inf was seen; what follows is then ignored.
        dropped: (g, d), once the sum or the vectors would have passed `LIMIT`; what follows is then only counted.
        grain: distance between the smallest numbers that the rows may be; gradients in float16 can be as small.
        mixed: rows of another shape came, as of a layer that is called at several widths; they are left out.
        vanished: a number that is not 0 had a square that is, in float64.
    """

    total: Tensor | None = None
    pending: list[Tensor] = field(default_factory=list)
    rows: int = 0
    vectors: int = 0
    noise: float = 0.0
    dtype: torch.dtype = torch.float64
    finite: bool = True
    fast: bool = False
    dropped: tuple[int, int] | None = None
    grain: float = 0.0
    mixed: bool = False
    vanished: bool = False

    def add(
        self,
        columns: Float[Tensor, "b g d k"],
        precision: Precision,
        scale: float = 1.0,
        *,
        new_rows: bool = True,
        once: Once | None = None,
    ) -> None:
        """Add b * k rows, each multiplied by `scale`.

        Args:
            columns: the data; read at once, never kept by reference.
            precision: how to multiply; float64 data is always multiplied in float64.
            scale: for gradients, the number of samples of the batch.
            new_rows: False for a further class of rows already counted.
            once: gives the rows' product if it was made before, else what it is given makes it.
        """
        pieces, groups, dim, width = columns.shape
        if not columns.numel():
            return  # a detector without proposals calls its heads on no image
        if not self.takes(groups, dim):
            return
        if not self.fits(groups, dim, pieces * width):
            self._count(pieces * width, columns.dtype, new_rows, scale)
            self.finite = self.finite and all(bool(torch.isfinite(piece).all()) for piece in columns)
            return
        if self.total is not None or self.vectors + pieces * width >= dim:
            chains, compiled = pieces, native.takes(columns)
            if compiled:
                precision = "float64" if precision == "auto" else precision  # takes no longer than float32
                chains = min(pieces, max(1, pieces * width // native.CHAIN))
            ways = arithmetic.gram_float64, arithmetic.gram_float32
            add = partial(self.add_product, lambda wide: ways[not wide](columns), (groups, dim), pieces * width, chains)
            add(columns, precision, scale, new_rows=new_rows, checked=compiled and dim >= rounding.FEW, once=once)
            return
        self._count(pieces * width, columns.dtype, new_rows, scale)
        kept = columns.permute(1, 2, 0, 3).flatten(2).to(torch.float64) * scale
        self.finite = self.finite and bool(torch.isfinite(kept).all())
        self.pending = [*self.pending, kept]  # a new list: `Capture.snapshot` keeps the one before

    def add_product(
        self,
        multiply: Callable[[bool], Float[Tensor, "g d d"]],
        shape: tuple[int, int],
        rows: int,
        pieces: int | float,
        data: Tensor,
        precision: Precision,
        scale: float = 1.0,
        *,
        new_rows: bool = True,
        checked: bool = True,
        once: Once | None = None,
    ) -> None:
        """Add a sum of x x^T over `rows` rows, each multiplied by `scale`.

        Args:
            multiply: gives the sum, by float64 products (True) or by float32 ones added in float64.
            shape: (g, d) of the sum.
            rows: at least as many as coordinates, with those already there.
            pieces: as many independent float32 products would leave as much noise.
            data: what the rows are of; `precision`, `new_rows` and `once`: as in `add`.
            checked: `multiply` sees to it that float32 roundings average out; else the data are pieces of rows.
        """
        if not self.takes(*shape):
            return
        self._count(rows, data.dtype, new_rows, scale)
        if not self.fits(*shape):
            self.finite = self.finite and bool(torch.isfinite(data).all())
            return
        self.spill()
        make = partial(product_of, multiply, rows, pieces, data, precision, checked=checked)
        product = make() if once is None else once(make)
        total, noise = product.total, product.noise
        if scale != 1.0:
            total, noise = total * scale**2, noise * scale**2
        self.total = total if self.total is None else self.total + total
        self.noise += noise
        self.fast = self.fast or product.fast
        self._note(product.finite, product.vanished)

    def takes(self, groups: int, dim: int) -> bool:
        """Whether rows of this shape can be added to those seen."""
        seen = self.total is not None or self.pending or self.dropped is not None
        self.mixed = self.mixed or bool(seen and self.shape[:2] != (groups, dim))
        return not self.mixed

    def fits(self, groups: int, dim: int, more: int = 0) -> bool:
        """Whether `LIMIT` holds the vectors counted and `more`, or their sum; if not, all is dropped for good."""
        if self.dropped is not None or groups * dim * min(dim, self.vectors + more) > LIMIT:
            self.dropped, self.total, self.pending = (groups, dim), None, []
        return self.dropped is None

    def coarsen(self, dtype: torch.dtype) -> None:
        """Note that the data has no more digits than this dtype."""
        self.dtype = max((self.dtype, dtype), key=lambda d: torch.finfo(d).eps)

    def _count(self, rows: int, dtype: torch.dtype, new_rows: bool, scale: float) -> None:
        self.rows += rows if new_rows else 0
        self.vectors += rows
        self.grain = max(self.grain, arithmetic.grain_of(dtype) * scale)
        if dtype != self.dtype:
            self.coarsen(dtype)

    def spill(self) -> None:
        """Turn the vectors kept so far into their sum."""
        if self.pending:
            rows = torch.cat(self.pending, dim=2)
            self.total = rows @ rows.mT
            self.pending = []
            self._note(*look_at(rows, self.total.diagonal(dim1=-2, dim2=-1)))

    def _note(self, finite: bool, vanished: bool) -> None:
        self.finite, self.vanished = self.finite and finite, self.vanished or vanished

    def rescale(self, factor: float) -> None:
        """Multiply every vector seen so far by the factor, to undo a loss scale."""
        if factor == 1.0:
            return
        self.noise *= factor**2
        self.grain *= factor
        self.total = None if self.total is None else self.total * factor**2
        self.pending = [vectors * factor for vectors in self.pending]

    def decomposable(self) -> Float[Tensor, "g m m"]:
        """The moment, or the Gram matrix with the same nonzero eigenvalues where that is smaller."""
        if self.total is not None:
            return self.total / max(1, self.rows)
        rows = torch.cat(self.pending, dim=2)
        return rows.mT @ rows / max(1, self.rows)

    @property
    def side(self) -> int:
        """Side of `decomposable`: d, or the number of vectors where that is smaller."""
        return self.dim if self.kept is None else self.kept

    def products(self) -> list[Callable[[Tensor], Tensor]]:
        """For each group, v to A v with A that of `decomposable`, which is not formed."""
        gram = self.total is None
        matrices = torch.cat(self.pending, dim=2) if self.total is None else self.total
        return [partial(_applied, matrix, gram, max(1, self.rows)) for matrix in matrices]

    @property
    def dim(self) -> int:
        """d, coordinates a group."""
        return (self.total if self.total is not None else self.pending[0]).shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the sum, [g, d, d], whether it was formed or not."""
        groups, dim = self.dropped or (self.total if self.total is not None else self.pending[0]).shape[:2]
        return groups, dim, dim

    @property
    def kept(self) -> int | None:
        """How many vectors are kept as they are, a group; None where they were summed."""
        return None if self.total is not None else sum(part.shape[2] for part in self.pending)

    @property
    def device(self) -> torch.device:
        """Where the sum is."""
        return (self.total if self.total is not None else self.pending[0]).device

    def diagonal(self) -> Float[Tensor, "g d"]:
        """E[x_i^2], of each coordinate."""
        if self.total is not None:
            return self.total.diagonal(dim1=-2, dim2=-1) / max(1, self.rows)
        return torch.cat(self.pending, dim=2).square().sum(2) / max(1, self.rows)

    def squared_sum(self) -> float:
        """E[(sum_i x_i)^2], added over the groups."""
        if self.total is not None:
            return float(self.total.sum()) / max(1, self.rows)
        return float(torch.cat(self.pending, dim=2).sum(1).square().sum()) / max(1, self.rows)


def _applied(matrix: Tensor, gram: bool, rows: int, vector: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """matrix @ vector / rows, or matrix^T matrix @ vector / rows, back on the vector's device."""
    image = matrix @ vector.to(matrix)
    return ((matrix.mT @ image if gram else image) / rows).to(vector)
