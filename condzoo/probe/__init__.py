"""The probe: each layer's conditioning, measured in any PyTorch network, at rest or while it trains."""

from condzoo.probe.blocks import curvature_blocks
from condzoo.probe.conditioning import Conditioning, LayerConditioning
from condzoo.probe.exact import curvature
from condzoo.probe.kronecker import KroneckerSpectrum
from condzoo.probe.kronecker_quality import KroneckerQuality, KroneckerReport, kronecker_report
from condzoo.probe.lanczos import TopEigenvalues
from condzoo.probe.matrix_free import top_curvature
from condzoo.probe.measuring import measure
from condzoo.probe.moments import input_moment, output_grad_moment
from condzoo.probe.neurons import Neurons
from condzoo.probe.plots import plot_comparison, plot_records
from condzoo.probe.records import read_records, record_columns, to_pandas
from condzoo.probe.spectra import Spectrum, condition_number, spectrum
from condzoo.probe.tensorboard import write_tensorboard
from condzoo.probe.training_probe import Probe

__all__ = [
    "Conditioning",
    "KroneckerQuality",
    "KroneckerReport",
    "KroneckerSpectrum",
    "LayerConditioning",
    "Neurons",
    "Probe",
    "Spectrum",
    "TopEigenvalues",
    "condition_number",
    "curvature",
    "curvature_blocks",
    "input_moment",
    "kronecker_report",
    "measure",
    "output_grad_moment",
    "plot_comparison",
    "plot_records",
    "read_records",
    "record_columns",
    "spectrum",
    "to_pandas",
    "top_curvature",
    "write_tensorboard",
]
