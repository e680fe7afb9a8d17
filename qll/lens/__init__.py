"""The lens: look inside the dense and the converted model.

In: weight matrices and activations. Out: entries of report.json. `spectra.look` is about matrices;
`sae.SAE` is a sparse autoencoder.
"""

from qll.lens.attach import Attached, attach
from qll.lens.cache import CodeCache, write_cache
from qll.lens.codes import SparseCodes
from qll.lens.compare import compare
from qll.lens.features import direct_attribution, logit_lens, top_examples
from qll.lens.ledger import Ledger
from qll.lens.measure import check_place, measure
from qll.lens.model import model_look
from qll.lens.sae import SAE, load_sae
from qll.lens.sae_metrics import SAEMetrics
from qll.lens.spectra import MatrixLook, look, matrix_entropies, random_spectrum, spectrum
from qll.lens.survival import Survival

__all__ = [
    "SAE",
    "Attached",
    "CodeCache",
    "Ledger",
    "MatrixLook",
    "SAEMetrics",
    "SparseCodes",
    "Survival",
    "attach",
    "check_place",
    "compare",
    "direct_attribution",
    "load_sae",
    "logit_lens",
    "look",
    "matrix_entropies",
    "measure",
    "model_look",
    "random_spectrum",
    "spectrum",
    "top_examples",
    "write_cache",
]
