"""What a measurement returns: plain data, layer by layer, in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from condzoo.probe.files import expanded
from condzoo.probe.kronecker import KroneckerSpectrum
from condzoo.probe.neurons import Neurons
from condzoo.probe.outliers import Outlier
from condzoo.probe.spectra import Spectrum


@dataclass(frozen=True, eq=False)
class LayerConditioning:
    """One layer's conditioning.

    Attributes:
        kind: "Linear", "Conv2d", "depthwise Conv2d", ...
        input: spectrum of Sigma_x = E[x x^T].
        output_grad: spectrum of Sigma_grad_h = E[g g^T], g = B * dL/dh.
        weight: sigma_max(W), of the weight that the forward pass used where it is computed from others
            (weight_norm, pruning); None where it is not seen (a quantized weight's codes).
        weight_grad: sigma_max(dL/dW) for the mean loss; None where there is no such gradient.
        samples: examples seen (a layer called twice in a forward pass sees each twice).
        positions: rows of the input an example, on average (1 for [n, d], h * w for a convolution).
        weight_frobenius, weight_grad_frobenius: Frobenius norms of W and dL/dW; None as above, and in records
            of before they were measured.
        frozen: the weight is a parameter that asked for no gradient; `measure` has that of such a one, too. False in
            a `Probe`, where `weight_grad` is None.
    """

    kind: str
    input: Spectrum
    output_grad: Spectrum
    weight: float | None
    weight_grad: float | None
    samples: int
    positions: int
    weight_frobenius: float | None = None
    weight_grad_frobenius: float | None = None
    frozen: bool = False

    @cached_property
    def fisher(self) -> KroneckerSpectrum:
        """Spectrum of Sigma_x (x) Sigma_grad_h, the layer's Kronecker-factored Fisher."""
        return KroneckerSpectrum(self.input, self.output_grad)

    @property
    def weight_domination(self) -> float | None:
        """sigma_max(dL/dW) / sigma_max(W); small where the weight dwarfs its gradient, None for a weight of zeros."""
        return self.weight_grad / self.weight if self.weight and self.weight_grad is not None else None


@dataclass(frozen=True, eq=False, repr=False)
class Conditioning(Mapping[str, LayerConditioning]):
    """The conditioning of a network: a mapping from layer name to `LayerConditioning`.

    Attributes:
        layers: in the order of the first call in the forward pass.
        neurons: dying and full units of each ReLU module, by its name.
        skipped: every layer that was not measured, with the reason.
        mode: "train" (batch statistics) or "eval", of the model as it was measured.
        dtype: the coarsest dtype of the layers' outputs, for example "float32".
        labels: "data" (M's factor), "model" (F's, exact) or "sample" (F's, one draw).
        random_signs: "model" was exact in the mean alone, over random signs (a large batch under batch statistics).
        loss: the batch-mean loss over all samples; None in a `Probe`, which does not see it.
        loss_name: which loss.
        conv: "channels" or "patches"; bias: whether a constant 1 was added to the inputs.
        precision: as asked for; each spectrum's `arithmetic` says what was used.
        kappa: False where only the largest eigenvalues were computed.
        samples: examples; batches: batches; step: training step of a `Probe`, else None.
        first_nonfinite: by direction, the layer where NaN or Inf appears first: "forward", in its output (or in
            its input, where it arises between layers); "backward", in its output's gradient.
        certificate: with `certify=True`, how far the dtype of the pass moved each layer's spectra.
        seed: what dropout and label draws were seeded with, None in a `Probe`.
    """

    layers: dict[str, LayerConditioning]
    neurons: dict[str, Neurons] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    mode: str = "train"
    dtype: str = "float32"
    labels: str = "data"
    random_signs: bool = False
    loss: float | None = None
    loss_name: str = ""
    conv: str = "channels"
    bias: bool = False
    precision: str = "auto"
    kappa: bool = True
    samples: int = 0
    batches: int = 0
    step: int | None = None
    seed: int | None = None
    first_nonfinite: dict[str, str] = field(default_factory=dict)
    certificate: dict[str, dict[str, float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerConditioning:
        """One layer; a KeyError says why it was skipped, or the closest name."""
        if name in self.layers:
            return self.layers[name]
        if name in self.skipped:
            raise KeyError(f"layer {name!r} was not measured: {self.skipped[name]}")
        close = get_close_matches(str(name), self.layers, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"measured: {', '.join(self.layers) or 'none'}"
        raise KeyError(f"no layer {name!r}; {hint}")

    def __iter__(self) -> Iterator[str]:
        """Layer names in forward order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Number of measured layers."""
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        """Whether the layer was measured."""
        return name in self.layers

    def __repr__(self) -> str:
        """In short: the eigenvalues of a deep network's layers fill pages."""
        step = "" if self.step is None else f"step {self.step}, "
        return (
            f"<Conditioning: {step}{len(self)} layers, {self.mode} mode, {self.samples} samples; print it for a table>"
        )

    def __str__(self) -> str:
        """The table."""
        return self.table()

    @property
    def last(self) -> LayerConditioning:
        """The last layer in forward order: a classifier's linear layer. A KeyError where none was measured."""
        return self[next(reversed(self.layers), "")]

    def outliers(self, factor: float = 10.0, p: float = 0.5) -> list[Outlier]:
        """The layers that have `factor` times the median of those like them or more, or its `factor`-th part or less.

        See `condzoo.probe.outliers.outliers`; docs/probe.md says what each may mean and what helps.
        """
        from condzoo.probe.outliers import outliers

        return outliers(self, factor, p)

    def table(self, p: float = 0.5) -> str:
        """The measurement as text: one line a layer, magnitudes and condition numbers.

        Args:
            p: fraction of the spectrum of the second condition number shown beside kappa at p = 1.
        """
        from condzoo.probe.tables import conditioning_table

        return conditioning_table(self, p)

    def to_json(self, path: str | Path) -> None:
        """Write everything, exactly, to a JSON file (schema: docs/probe.md)."""
        from condzoo.probe.serialization import write_json

        write_json(self, expanded(path))

    @classmethod
    def from_json(cls, path: str | Path) -> Conditioning:
        """Read what `to_json` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a conditioning record of a known schema.
        """
        from condzoo.probe.serialization import read_json

        return read_json(expanded(path))

    def plot(self, path: str | Path) -> None:
        """Draw magnitudes, condition numbers, spectra and units by depth, and the last layer, as PNG, PDF or SVG."""
        from condzoo.probe.depth_plots import plot_conditioning

        plot_conditioning(self, expanded(path))
