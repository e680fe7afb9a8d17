"""Makes saes/ and saes.safetensors: small autoencoders by the packages whose formats we read.

The packages are no dependencies: `pip install eai-sparsify==1.3.3 sae-lens==6.54.12` into an
environment of its own, then `python -m tests.golden.make_saes`. saes.safetensors holds the input
`x` and, for each folder, what its package makes of it: `<folder>/codes` (all features) and
`<folder>/out`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sae_lens
import sparsify
import torch
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
FOLDER = HERE / "saes"
D_IN, D_SAE, K, TOKENS = 8, 24, 4, 12
METADATA = {"hook_name": "blocks.3.hook_resid_post", "model_name": "tiny"}


def fill(module: torch.nn.Module) -> None:
    """Random weights of every kind, thresholds above zero."""
    for name, parameter in sorted(module.named_parameters()):
        parameter.data.normal_(0, 0.5)
        if name == "threshold":
            parameter.data.abs_()


def make_sparsify(x: torch.Tensor, results: dict[str, torch.Tensor]) -> None:
    """SAEs and transcoders of eai-sparsify, each in the folder of a hookpoint."""
    kinds = {
        "topk/layers.3": {},
        "topk/layers.4": {"num_latents": 0, "expansion_factor": 3},
        "groupmax/layers.3": {"activation": "groupmax"},
        "bfloat16/model.layers.3": {"dtype": torch.bfloat16},
        "transcoder/layers.3.mlp": {"transcode": True, "skip_connection": True},
        "seeds/layers.3/seed1": {"skip_connection": True},
    }
    for name, settings in kinds.items():
        dtype = settings.pop("dtype", None)
        config = sparsify.SparseCoderConfig(**({"k": K, "num_latents": D_SAE} | settings))
        coder = sparsify.SparseCoder(D_IN, config, dtype=dtype)
        fill(coder)
        coder.save_to_disk(FOLDER / "sparsify" / name)
        coder = sparsify.SparseCoder.load_from_disk(FOLDER / "sparsify" / name).float()
        with torch.no_grad():
            values, indices, _ = coder.encode(x)
            out = coder(x).sae_out
        codes = torch.zeros(TOKENS, D_SAE).scatter_(1, indices, values)
        results |= {f"sparsify/{name}/codes": codes, f"sparsify/{name}/out": out}


def old_generations() -> None:
    """The same weights with the cfg.json files of 2024 beside them."""
    new = FOLDER / "sparsify" / "topk" / "layers.4"
    july = {"expansion_factor": 3, "normalize_decoder": True, "k": K, "signed": False, "d_in": D_IN}
    for name, config in {"2024-07": july, "2024-08": july | {"num_latents": 0}}.items():
        folder = FOLDER / "sparsify" / name / "layer_5"
        folder.mkdir(parents=True)
        shutil.copy(new / "sae.safetensors", folder)
        (folder / "cfg.json").write_text(json.dumps(config))


def saelens_cases() -> dict[str, sae_lens.SAE]:
    """One autoencoder of each architecture and each run-time normalisation."""
    common = {"d_in": D_IN, "d_sae": D_SAE}
    across = common | {"d_out": D_IN, "apply_b_dec_to_input": False}
    cases = {
        "standard": sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**common)),
        "no_b_dec": sae_lens.StandardSAE(
            sae_lens.StandardSAEConfig(**common, apply_b_dec_to_input=False)
        ),
        "layer_norm": sae_lens.StandardSAE(
            sae_lens.StandardSAEConfig(**common, normalize_activations="layer_norm")
        ),
        "constant_norm": sae_lens.StandardSAE(
            sae_lens.StandardSAEConfig(**common, normalize_activations="constant_norm_rescale")
        ),
        "topk": sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**common, k=K)),
        "topk_rescaled": sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True)
        ),
        "abstopk": sae_lens.AbsTopKSAE(sae_lens.AbsTopKSAEConfig(**common, k=K)),
        "jumprelu": sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**common)),
        "gated": sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**common)),
        "transcoder": sae_lens.Transcoder(sae_lens.TranscoderConfig(**across)),
        "skip_transcoder": sae_lens.SkipTranscoder(sae_lens.SkipTranscoderConfig(**across)),
        "jumprelu_transcoder": sae_lens.JumpReLUTranscoder(
            sae_lens.JumpReLUTranscoderConfig(**across)
        ),
    }
    for name, case in cases.items():
        fill(case)
        where = dict(METADATA)
        if name.endswith("transcoder"):
            where |= {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
        for key, value in where.items():
            case.cfg.metadata[key] = value
    return cases


def make_saelens(x: torch.Tensor, results: dict[str, torch.Tensor]) -> None:
    """Inference autoencoders of sae-lens, opened again by it."""
    for name, case in saelens_cases().items():
        case.save_model(FOLDER / "saelens" / name)
        remember(name, sae_lens.SAE.load_from_disk(FOLDER / "saelens" / name), x, results)
    make_batchtopk(x, results)
    make_scaled(x, results)


def make_batchtopk(x: torch.Tensor, results: dict[str, torch.Tensor]) -> None:
    """A batch top-k autoencoder as sae-lens saves it for inference: a jumprelu."""
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)
    trained = sae_lens.BatchTopKTrainingSAE(config)
    fill(trained)
    trained.topk_threshold = torch.tensor(0.7)
    trained.cfg.metadata["hook_name"] = METADATA["hook_name"]
    trained.save_inference_model(str(FOLDER / "saelens" / "batchtopk"))
    opened = sae_lens.SAE.load_from_disk(FOLDER / "saelens" / "batchtopk")
    assert opened.cfg.architecture() == "jumprelu"
    remember("batchtopk", opened, x, results)


def make_scaled(x: torch.Tensor, results: dict[str, torch.Tensor]) -> None:
    """Factors and whitenings beside the weights; the answer is sae-lens' after it folded them."""
    base = {"d_in": D_IN, "d_sae": D_SAE}
    root = torch.randn(D_IN, D_IN, dtype=torch.float64)
    matrix = torch.linalg.inv(root) + torch.eye(D_IN)
    white = ActivationWhitening(torch.randn(D_IN).double(), matrix, torch.linalg.inv(matrix))
    kinds = {
        "scaled": (sae_lens.JumpReLUSAEConfig, "expected_average_only_in"),
        "whitened": (sae_lens.JumpReLUSAEConfig, "covariance_whitening"),
    }
    for name, (config, norm) in kinds.items():
        case = sae_lens.JumpReLUSAE(config(**base, normalize_activations=norm))
        fill(case)
        case.cfg.metadata["hook_name"] = METADATA["hook_name"]
        folder = FOLDER / "saelens" / name
        case.save_model(folder)
        scaler = ActivationScaler(scaling_factor=2.5 if name == "scaled" else None)
        scaler.whitening = white if name == "whitened" else None
        scaler.save(str(folder / "activation_scaler.json"))
        if name == "scaled":
            case.fold_activation_norm_scaling_factor(2.5)
        else:
            case.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
        remember(name, case, x, results)


def remember(
    name: str, case: sae_lens.SAE, x: torch.Tensor, results: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        codes = case.encode(x)
        results[f"saelens/{name}/codes"] = codes.to_dense() if codes.is_sparse else codes
        results[f"saelens/{name}/out"] = case(x)


def pre_6() -> None:
    """The topk weights with the flat cfg.json of SAELens before 6."""
    folder = FOLDER / "saelens" / "version_5"
    folder.mkdir()
    shutil.copy(FOLDER / "saelens" / "topk" / "sae_weights.safetensors", folder)
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "hook_point": "blocks.3.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "sae_lens_training_version": "5.3.0",
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def main() -> None:
    """Write everything anew."""
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    x = torch.randn(TOKENS, D_IN)
    results = {"x": x}
    make_sparsify(x, results)
    old_generations()
    make_saelens(x, results)
    pre_6()
    opened = sae_lens.SAE.load_from_disk(FOLDER / "saelens" / "version_5")
    remember("version_5", opened, x, results)
    for name in ("2024-07", "2024-08"):
        for part in ("codes", "out"):
            results[f"sparsify/{name}/layer_5/{part}"] = results[f"sparsify/topk/layers.4/{part}"]
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in results.items()},
        HERE / "saes.safetensors",
    )
    assert set(load_file(HERE / "saes.safetensors")) == set(results)


if __name__ == "__main__":
    main()
