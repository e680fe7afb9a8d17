"""Jobs and machines: who computes the factorisations of a run, and what a run of any size needs.

Input: the settings of a run and what it reads, or only the shape of a model and of a machine.
Read job.py first; processes.py and cluster.py run jobs, planner.py predicts them.
"""

from qll.scale.executor import executor_of
from qll.scale.inputs import Inputs, opened_here
from qll.scale.memory import job_bytes
from qll.scale.shapes import shape_of

__all__ = ["Inputs", "executor_of", "job_bytes", "opened_here", "shape_of"]
