"""A Llama whose matrices may be tensor networks, as transformers knows models.

Importing this module registers the classes, so `AutoModelForCausalLM.from_pretrained(folder)` opens
a converted folder. An own model_type makes transformers fail loudly where this package is absent
(with model_type "llama" it would skip the unknown quantisation and invent the weights), and
auto_map offers `trust_remote_code=True` as a second way in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qll.errors import IntegrityError
from qll.model.files import AUTO_MAP, seal, write_code
from qll.model.fingerprint import logits_fingerprint
from qll.model.packed import PackedTensor, Packings, require_finite
from qll.model.quantizer import MODEL_TYPE, TNConfig
from qll.model.swap import Entries, insert_networks


# transformers makes this a dataclass whose __init__ takes more than its fields, which the run-time
# type checker of the tests does not know; @strict checks the fields
@no_type_check
@strict
class LlamaTNConfig(LlamaConfig):
    """A LlamaConfig with, under quantization_config, the entries that are tensor networks.

    original_architecture: the class whose architecture this is (TransformerLens reads it).
    qll_folded_norms: RMSNorm gains were multiplied into the next matrices; the stored ones are 1.

    >>> LlamaTNConfig(qll_folded_norms=True).auto_map["AutoModelForCausalLM"]
    'modeling_qll.LlamaTNForCausalLM'
    """

    model_type = MODEL_TYPE
    # the dense plan would cut cores at the wrong places; without a plan transformers refuses
    base_model_tp_plan = None

    original_architecture: str = "LlamaForCausalLM"
    qll_folded_norms: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the config; every folder written from it can be opened by its own code."""
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    @property
    def entries(self) -> Entries:
        """The tensor networks of the checkpoint by their members."""
        return self._stored.entries()

    @property
    def packings(self) -> Packings:
        """Bits and group of what the checkpoint stores in integers, by module path."""
        return self._stored.packings()

    @property
    def _stored(self) -> TNConfig:
        stored = getattr(self, "quantization_config", None) or {}
        return stored if isinstance(stored, TNConfig) else TNConfig(**stored)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this file into saved folders, not modeling_qll.py."""


class LlamaTNForCausalLM(LlamaForCausalLM):
    """transformers' Llama with network modules in the places that its config names."""

    config_class = LlamaTNConfig

    def __init__(self, config: LlamaTNConfig) -> None:
        """Cores are NaN until they are loaded."""
        super().__init__(config)
        insert_networks(self, config.entries, config.packings)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a converted folder; every argument of transformers' own works.

        Raises IntegrityError for any missing, unexpected or mismatched key, where transformers
        would warn and fill in random numbers.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # let a wrong shape through to the check below, which can name it
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        _require_exact(info, folder)
        for name, module in model.named_modules():
            if isinstance(module, PackedTensor):
                require_finite(module.scales, f"{folder}: {name}.scales")
        return (model, info) if wants_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing: transformers would copy this file into saved folders, not modeling_qll.py."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' own, plus the code file and, last, a manifest: a complete folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(Path(save_directory))
        seal(Path(save_directory), logits_fingerprint(self))


def _require_exact(info: dict[str, Any], folder: Any) -> None:
    problems = {
        "tensor is missing": info["missing_keys"],
        "tensor has no place in this model": info["unexpected_keys"],
        "tensor has the wrong shape": [
            f"{name} (file {tuple(stored)}, config {tuple(wanted)})"
            for name, stored, wanted in info["mismatched_keys"]
        ],
    }
    for what, names in problems.items():
        if names:
            raise IntegrityError(
                what,
                where=folder,
                found=f"{sorted(names)[0]} and {len(names) - 1} more"
                if len(names) > 1
                else next(iter(names)),
                hint="the weights and config.json disagree: convert or copy the folder again",
            )


AutoConfig.register(MODEL_TYPE, LlamaTNConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaTNConfig, LlamaTNForCausalLM, exist_ok=True)
