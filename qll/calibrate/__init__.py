"""Text to second moments per linear layer (input, output gradient), streamed block by block."""

from qll.calibrate.capture import collect
from qll.calibrate.journal import Journal
from qll.calibrate.moments import LINEARS, LinearMoments, MomentStore
from qll.calibrate.passes import ExtraGradients, Labels
from qll.calibrate.prior import prior_windows
from qll.calibrate.streams import Streams

__all__ = [
    "LINEARS",
    "ExtraGradients",
    "Journal",
    "Labels",
    "LinearMoments",
    "MomentStore",
    "Streams",
    "collect",
    "prior_windows",
]
