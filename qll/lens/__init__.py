"""The lens: look inside the dense and the converted model.

In: weight matrices (and, from a later issue, activations). Out: entries of report.json. Read
`spectra.look` first.
"""

from qll.lens.model import model_look
from qll.lens.spectra import MatrixLook, look, matrix_entropies, random_spectrum, spectrum

__all__ = ["MatrixLook", "look", "matrix_entropies", "model_look", "random_spectrum", "spectrum"]
