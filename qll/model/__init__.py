"""Run it: tensor networks as modules of a transformers Llama; block runner, export, generation."""

from qll.model.blocks import build_block, embed, head, run_block
from qll.model.dense import load_dense
from qll.model.export import export_dense, export_two_linear
from qll.model.files import write_static_files
from qll.model.fingerprint import check_fingerprint, logits_fingerprint
from qll.model.folder import commit_folder, load, verify_folder
from qll.model.generate import generate
from qll.model.groups import TNGroup, TNMember, group_path
from qll.model.layers import TNEmbedding, TNLinear, TNTiedHead
from qll.model.llama_tn import LlamaTNConfig, LlamaTNForCausalLM
from qll.model.norms import fold_gain, gain_of
from qll.model.packed import PackedLinear, PackedTensor, make_scales_trainable, tuned_scales
from qll.model.quantizer import TNConfig
from qll.model.swap import insert_networks, packed_numbers, stored_shapes

__all__ = [
    "LlamaTNConfig",
    "LlamaTNForCausalLM",
    "PackedLinear",
    "PackedTensor",
    "TNConfig",
    "TNEmbedding",
    "TNGroup",
    "TNLinear",
    "TNMember",
    "TNTiedHead",
    "build_block",
    "check_fingerprint",
    "commit_folder",
    "embed",
    "export_dense",
    "export_two_linear",
    "fold_gain",
    "gain_of",
    "generate",
    "group_path",
    "head",
    "insert_networks",
    "load",
    "load_dense",
    "logits_fingerprint",
    "make_scales_trainable",
    "packed_numbers",
    "run_block",
    "stored_shapes",
    "tuned_scales",
    "verify_folder",
    "write_static_files",
]
