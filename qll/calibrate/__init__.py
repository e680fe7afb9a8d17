"""Text to second moments per linear layer (input, output gradient), streamed block by block."""

from qll.calibrate.capture import collect
from qll.calibrate.moments import LINEARS, LinearMoments, MomentStore

__all__ = ["LINEARS", "LinearMoments", "MomentStore", "collect"]
