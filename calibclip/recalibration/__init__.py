"""Recalibration: maps, fitted on held-out predictions, that make confidences match accuracies.

:func:`fit_temperature` and :func:`fit_vector_scaling` map logits to logits, by maximum likelihood.
:func:`fit_isotonic` and :func:`fit_histogram_binning` map probabilities to probabilities, without a
parametric form. Each returns a small frozen dataclass to be called on new predictions; it can be
compared, pickled, and turned into a dict of plain values (``to_dict``) and back (``from_dict``).

Whether to fit on clean images, on adversarial ones or on both is a choice, and it matters: pass the
predictions meant, or a concatenation. PyTorch tensors and NumPy arrays are taken, on any device;
they are never modified, and what went in as NumPy comes out as NumPy.
"""

from calibclip.recalibration._common import RecalibrationWarning
from calibclip.recalibration.histogram_binning import HistogramBinning, fit_histogram_binning
from calibclip.recalibration.isotonic import IsotonicCalibration, fit_isotonic
from calibclip.recalibration.temperature import Temperature, fit_temperature
from calibclip.recalibration.vector_scaling import VectorScaling, fit_vector_scaling

__all__ = [
    "HistogramBinning",
    "IsotonicCalibration",
    "RecalibrationWarning",
    "Temperature",
    "VectorScaling",
    "fit_histogram_binning",
    "fit_isotonic",
    "fit_temperature",
    "fit_vector_scaling",
]
