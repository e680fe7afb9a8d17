"""How transformers learns which matrices of a checkpoint are tensor networks.

config.json holds, under "quantization_config", the method name "qll_tn", a format version and one
network spec per entry; the key of an entry is its member path, or the paths of a group joined by
"|". Under "packed" it holds bits and group of what is stored in integers, by module path.
transformers turns that into a TNConfig and asks the TNQuantizer for the rest. The modules
themselves are put in place by the model class (`LlamaTNForCausalLM`), so that a model built from a
config alone has them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qll.errors import ConfigError
from qll.model.packed import Packings
from qll.model.swap import Entries, rebuild_dense
from qll.tn.network import NetworkSpec
from qll.tn.packed import SCALE_DTYPE, Packing

METHOD = "qll_tn"
FORMAT_VERSION = 1
MODEL_TYPE = "llama_tn"


@register_quantization_config(METHOD)
class TNConfig(QuantizationConfigMixin):
    """The entries of a converted checkpoint as they stand in config.json.

    >>> spec = NetworkSpec("lowrank", (6, 4), (2,))
    >>> TNConfig.from_entries({("lm_head",): spec}).entries()[("lm_head",)] == spec
    True
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        packed: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ConfigError for a version of the format that this code does not know."""
        if format_version != FORMAT_VERSION:
            raise ConfigError(
                "converted checkpoint of another format version",
                where="config.json",
                expected=FORMAT_VERSION,
                found=format_version,
                hint="install the version of quantum-llama-lens that wrote it",
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = {key: dict(spec) for key, spec in (modules or {}).items()}
        self.packed = dict(packed or {})

    @classmethod
    def from_entries(cls, entries: Entries, packings: Packings | None = None) -> TNConfig:
        """The config of `entries`, and of what is packed by module path."""
        return cls(
            {"|".join(members): spec.to_json() for members, spec in entries.items()},
            packed={path: packing.to_json() for path, packing in (packings or {}).items()},
        )

    def entries(self) -> dict[tuple[str, ...], NetworkSpec]:
        """The entries by their members; raises ConfigError for a spec that cannot be read."""
        found = {}
        for key, value in self.modules.items():
            try:
                found[tuple(key.split("|"))] = NetworkSpec.from_json(value)
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    "network spec cannot be read",
                    where=f"config.json: {key}",
                    found=repr(error),
                    hint="copy the folder again",
                ) from None
        return found

    def packings(self) -> dict[str, Packing]:
        """How what is packed is packed; raises ConfigError for what cannot be read."""
        found = {}
        for path, value in self.packed.items():
            try:
                found[path] = Packing.from_json(value)
            except (ConfigError, KeyError, TypeError) as error:
                raise ConfigError(
                    "packing cannot be read",
                    where=f"config.json: {path}",
                    found=repr(error),
                    hint="copy the folder again",
                ) from None
        return found


@register_quantizer(METHOD)
class TNQuantizer(HfQuantizer):
    """Loads, saves and dequantises; conversion itself is the work of `qll convert`."""

    # refuses TNConfig on a dense checkpoint: there is no conversion on the fly
    requires_calibration = True

    def is_serializable(self) -> bool:
        """True: the cores are ordinary tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the cores are ordinary parameters: not when some are packed."""
        return not self.quantization_config.packed

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """What is saved: scales in their own dtype, whichever they were read in."""
        if not self.quantization_config.packed:
            return None, {}
        state = {
            name: tensor.to(SCALE_DTYPE) if name.endswith(".scales") else tensor
            for name, tensor in model.state_dict().items()
        }
        return state, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        """Refuse a stock class: it would invent every converted matrix and only warn."""
        if type(model).config_class.model_type != MODEL_TYPE:
            raise ConfigError(
                "a converted checkpoint cannot be opened as this class",
                expected="LlamaTNForCausalLM",
                found=type(model).__name__,
                hint="use AutoModelForCausalLM.from_pretrained",
            )

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        rebuild_dense(model, dtype or model.dtype)
        return model
