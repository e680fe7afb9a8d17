"""Flags of the founding scripts: what they are called here, and which of them do nothing.

>>> TRAIN["--phase_coh"], sorted(WITHOUT_EFFECT_IN_GENERATE)
('--coherence', ['--mode', '--model_args'])
"""

TRAIN = {
    "--checkpoint_dir": "--out",
    "--gradient_accumulation_steps": "--accumulate_steps",
    "--phase_coh": "--coherence",
    "--coherence_weight": "--coherence",
    "--energy_weight": "--interference",
    "--no_amp": "--precision=float32",
}
_MODE = {"--mode": "the verb says what to do: lm train, lm generate"}
WITHOUT_EFFECT_IN_TRAIN = {
    **_MODE,
    "--num_workers": "batches are made by the process that trains",
    "--phase_dim": "phases are those of pairs of channels, half of --model_dim",
}
WITHOUT_EFFECT_IN_GENERATE = {
    **_MODE,
    "--model_args": "the model's folder says what it is made of",
}
