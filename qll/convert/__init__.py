"""Weights -> tensor networks: metric -> plan -> fit -> refine -> write. Read planner.py first.

Input: a Source and its MomentStore. Output: a plan, and a folder of shards.
`FORMATS` names what --format accepts; each is fitted by `fit` in the metric of its unit.
"""

from qll.callable_room import callable_room
from qll.convert.assemble import assemble
from qll.convert.fit import fit
from qll.convert.gauged import disentangled
from qll.convert.jobs import Executor, InOrder
from qll.convert.plan import Plan, PlanEntry, load_plan
from qll.convert.planner import make_plan
from qll.convert.quantise import packings_of, quantise_units
from qll.convert.refinement import RefineSettings, refine, require_held_out
from qll.convert.remeasure import measured_again
from qll.convert.sensitivity import TRIAL_CONTEXT, TRIAL_TOKENS, Sensitivity, Trial
from qll.convert.stored import trained_path
from qll.convert.weights import metrics_of, read_weights
from qll.convert.write import convert_units, saved_dtype
from qll.tn import JOINTS, NETWORKS

FORMATS = ("auto", "dense", *NETWORKS, *JOINTS)

__all__ = [
    "FORMATS",
    "TRIAL_CONTEXT",
    "TRIAL_TOKENS",
    "Executor",
    "InOrder",
    "Plan",
    "PlanEntry",
    "RefineSettings",
    "Sensitivity",
    "Trial",
    "assemble",
    "convert_units",
    "disentangled",
    "fit",
    "load_plan",
    "make_plan",
    "measured_again",
    "metrics_of",
    "packings_of",
    "quantise_units",
    "read_weights",
    "refine",
    "require_held_out",
    "saved_dtype",
    "trained_path",
]

callable_room(__name__, "qll.api", "convert")
