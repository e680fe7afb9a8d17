"""The lens: look inside the dense and the converted model.

In: weight matrices and activations. Out: entries of report.json. `spectra.look` is about matrices;
`sae.SAE` is a sparse autoencoder.
"""

from qll.lens.attach import Attached, attach
from qll.lens.cache import CodeCache, write_cache
from qll.lens.causal import causal
from qll.lens.codes import SparseCodes
from qll.lens.compare import compare
from qll.lens.critical import NestedCuts
from qll.lens.features import direct_attribution, logit_lens, top_examples
from qll.lens.ledger import Ledger
from qll.lens.measure import check_place, measure
from qll.lens.model import model_look
from qll.lens.read_write import crossings, weight_survival
from qll.lens.sae import SAE, load_sae
from qll.lens.sae_metrics import SAEMetrics
from qll.lens.spectra import MatrixLook, look, matrix_entropies, random_spectrum, spectrum
from qll.lens.study import Study, study
from qll.lens.survival import Survival
from qll.lens.weight_table import weight_table

__all__ = [
    "SAE",
    "Attached",
    "CodeCache",
    "Ledger",
    "MatrixLook",
    "NestedCuts",
    "SAEMetrics",
    "SparseCodes",
    "Study",
    "Survival",
    "attach",
    "causal",
    "check_place",
    "compare",
    "crossings",
    "direct_attribution",
    "load_sae",
    "logit_lens",
    "look",
    "matrix_entropies",
    "measure",
    "model_look",
    "random_spectrum",
    "spectrum",
    "study",
    "top_examples",
    "weight_survival",
    "weight_table",
    "write_cache",
]
