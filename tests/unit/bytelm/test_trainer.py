"""The loop: what it writes, when it stops, what it refuses to believe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qll.bytelm.checkpoint import read_checkpoint, write_checkpoint
from qll.bytelm.config import LossConfig, ModelConfig
from qll.bytelm.dataset import BatchLoader, MemoryEfficientByteDataset
from qll.bytelm.leak import first_leak, require_plausible
from qll.bytelm.model import ByteModel
from qll.bytelm.packed import Document, pack
from qll.bytelm.runfiles import RunFiles
from qll.bytelm.saved import load_lm
from qll.bytelm.settings import LearningSettings, LMTrainConfig, SizeSettings, WatchSettings
from qll.bytelm.stages import STAGES, Stage, stages_of
from qll.bytelm.trainer import Trainer
from qll.errors import ConfigError, IntegrityError, LeakError, NonFiniteError, UsageError
from qll.train.schedule import Schedule

SMALL = ModelConfig(d_model=16, n_layers=1, n_heads=2, context=16)
TEXT = "".join(f"{n * n} is the square of {n}. " for n in range(300)).encode()


def config_of(out, steps=12, stages="language_first", losses=None, seconds=None, **watch):
    learning = LearningSettings(
        lr=0.01, batch_size=4, accumulate_steps=1, max_steps=steps, stages=stages
    )
    return LMTrainConfig(
        data=(Path("text"),),
        out=out,
        max_seconds=seconds,
        learning=learning,
        losses=losses or LossConfig(),
        watch=WatchSettings(**({"log_every": 4, "val_every": 6} | watch)),
    )


def trainer_of(config, model=None, seed=0, held_out=TEXT[:400]):
    path = pack([Document("text", TEXT)], config.out / "data" / "0.bytes")
    torch.manual_seed(seed)
    return Trainer(
        config,
        model or ByteModel(SMALL),
        BatchLoader([MemoryEfficientByteDataset(path, 16)], 4),
        [np.frombuffer(held_out, np.uint8)],
        config.learning.max_steps,
    )


def test_the_files_of_a_run_say_what_their_description_promises(tmp_path):
    trainer = trainer_of(config_of(tmp_path))
    assert trainer.run() == "steps"
    files = RunFiles(tmp_path)
    train, validation = files.lines("train"), files.lines("validation")
    assert [line["step"] for line in train] == [4, 8, 12]
    assert [line["step"] for line in validation] == [6, 12]
    keys = (
        "step bytes loss bits_per_byte learning_rate gradient_norm tokens_per_second seconds "
        "eta_seconds rss_bytes device_bytes stage"
    )
    assert set(keys.split()) <= set(train[0])
    assert train[-1]["bytes"] == 12 * 4 * 16
    assert validation[-1]["best_bits_per_byte"] == min(v["bits_per_byte"] for v in validation)
    assert files.beat()["step"] == 12
    best = load_lm(tmp_path)
    assert best.config == SMALL


def test_a_run_stops_early_when_nothing_gets_better(tmp_path):
    config = config_of(tmp_path, steps=1000, patience=2, val_every=1)
    config = dataclasses.replace(config, learning=dataclasses.replace(config.learning, lr=1e-30))
    trainer = trainer_of(config)
    assert trainer.run() == "patience"
    assert trainer.progress.step < 20


def test_seconds_end_a_run_that_has_steps_left(tmp_path):
    trainer = trainer_of(config_of(tmp_path, steps=10**6, seconds=0.5))
    assert trainer.run() == "seconds"
    assert 0.5 <= trainer.progress.seconds < 30
    last = RunFiles(tmp_path).lines("train")[-1:]
    assert all(line["learning_rate"] < 0.01 for line in last)


class Leaking(ByteModel):
    """A model whose logits know the next byte of the window."""

    def step(self, ids, state, notes=None):
        logits, state = super().step(ids, state, notes)
        following = torch.nn.functional.one_hot(ids.roll(-1, dims=1), 256)
        following[:, -1] = 0
        return logits + 20.0 * following, state


def test_a_model_that_sees_the_future_is_refused_before_training(tmp_path):
    with pytest.raises(LeakError, match="the model sees the future"):
        trainer_of(config_of(tmp_path), Leaking(SMALL)).run()
    files = RunFiles(tmp_path)
    assert files.beat()["state"] == "failed"
    assert not files.model.exists()
    assert not files.metrics.exists()
    assert first_leak(ByteModel(SMALL), 16) is None
    assert first_leak(Leaking(SMALL), 16) is not None


def test_a_validation_too_good_to_be_true_stops_the_run(tmp_path, monkeypatch):
    # as if the leak had not been found before: the numbers give it away
    monkeypatch.setattr("qll.bytelm.trainer.require_causal", lambda model, context: None)
    with pytest.raises(LeakError, match="the model sees the future"):
        trainer_of(config_of(tmp_path), Leaking(SMALL)).run()
    assert not RunFiles(tmp_path).model.exists()
    assert RunFiles(tmp_path).lines("validation") == []


def test_held_out_text_that_was_trained_on_is_suspected(tmp_path):
    """A causal model that knows its text by heart, measured on it."""
    easy = b"ab" * 200
    with pytest.raises(LeakError, match=r"suspected leak.*bz2 needs .* held-out text that is also"):
        require_plausible(0.9, 1.0, ByteModel(SMALL), 16, [np.frombuffer(easy, np.uint8)])
    require_plausible(1.0, 1.0, ByteModel(SMALL), 16, [])
    require_plausible(0.1, 0.0, ByteModel(SMALL), 16, [])


def test_numbers_that_are_not_finite_end_the_run_and_leave_the_checkpoint(tmp_path):
    config = config_of(tmp_path, save_every=4)
    trainer = trainer_of(config)
    step = trainer.learner.step

    def poisoned(loader, number, *rest):
        if number == 10:
            with torch.no_grad():
                trainer.learner.model.blocks[0].feed_forward.down.weight.fill_(float("nan"))
        return step(loader, number, *rest)

    trainer.learner.step = poisoned
    with pytest.raises(NonFiniteError, match=r"step 10: .*weight blocks\.0\.feed_forward\.down"):
        trainer.run()
    assert RunFiles(tmp_path).beat()["state"] == "failed"
    resumed = trainer_of(config, seed=1)
    resumed.restore()
    assert resumed.progress.step == 8
    assert resumed.run() == "steps"


@pytest.mark.parametrize("weighting", ["constant", "uncertainty"])
def test_an_interrupted_run_ends_with_the_same_weights_and_lines(tmp_path, weighting):
    losses = LossConfig(coherence=0.1, weighting=weighting)
    whole = trainer_of(config_of(tmp_path / "whole", losses=losses))
    whole.run()
    config = config_of(tmp_path / "cut", losses=losses, save_every=5)
    first = trainer_of(config)
    step = first.learner.step

    def interrupted(loader, number, *rest):
        if number == 9:
            raise KeyboardInterrupt
        return step(loader, number, *rest)

    first.learner.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = trainer_of(config, seed=7)
    second.restore()
    # the best of step 6 was saved, with the checkpoint of that step
    assert second.progress.step == 6
    second.run()
    for group, tensors in whole.learner.groups().items():
        for name, tensor in tensors.items():
            assert tensor.equal(second.learner.groups()[group][name]), name
    timed = {"seconds", "tokens_per_second", "eta_seconds", "rss_bytes"}
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in RunFiles(out).lines()]
        for out in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert lines[0] == lines[1]


def test_stages_change_the_losses_of_a_run(tmp_path):
    curriculum = tmp_path / "stages.json"
    curriculum.write_text(
        json.dumps(
            [
                {"name": "language", "share": 2, "scale": 0},
                {"name": "phases", "share": 1, "losses": {"coherence": 0.5}},
            ]
        )
    )
    trainer = trainer_of(config_of(tmp_path / "run", stages=str(curriculum)))
    trainer.run()
    lines = RunFiles(tmp_path / "run").lines("train")
    assert [line["stage"] for line in lines] == ["language", "language", "phases"]
    assert ["loss_coherence" in line for line in lines] == [False, False, True]


def test_a_model_grows_at_the_border_of_a_stage_and_resumes_as_it_was(tmp_path):
    curriculum = tmp_path / "stages.json"
    stages = [{"name": "narrow"}, {"name": "wide", "d_model": 32}]
    curriculum.write_text(json.dumps(stages))
    whole = trainer_of(config_of(tmp_path / "whole", stages=str(curriculum)))
    whole.run()
    assert whole.learner.model.config.d_model == 32
    lines = RunFiles(tmp_path / "whole").lines("validation")
    # validated before (step 6) and after (step 12) the growth of step 6
    assert lines[1]["bits_per_byte"] < lines[0]["bits_per_byte"] + 0.1
    config = config_of(tmp_path / "cut", stages=str(curriculum), save_every=8)
    trainer_of(config).run()
    again = trainer_of(config, seed=5)
    again.restore()
    assert again.learner.model.config == whole.learner.model.config
    for name, tensor in whole.learner.model.state_dict().items():
        assert tensor.equal(again.learner.model.state_dict()[name]), name


def test_curricula_are_checked(tmp_path):
    assert [stage.share for stage in stages_of("seed")] == [2, 3, 4, 5]
    assert stages_of("seed")[1].weights(LossConfig()).interference == 0.02
    assert [stage.d_model for stage in STAGES["growth"]] == [256, 512, 768]
    assert Stage("all").weights(LossConfig(coherence=0.3)) == LossConfig(coherence=0.3)
    for text in ("{", "[]", "[1]", '[{"share": 1}]', '[{"name": "a", "bogus": 1}]'):
        (tmp_path / "stages.json").write_text(text)
        with pytest.raises(UsageError, match="not a list of stages"):
            stages_of(str(tmp_path / "stages.json"))
    for item in ({"share": -1}, {"losses": {"bogus": 1.0}}, {"d_model": 0.5}):
        (tmp_path / "stages.json").write_text(json.dumps([{"name": "a", **item}]))
        with pytest.raises(UsageError):
            stages_of(str(tmp_path / "stages.json"))
    with pytest.raises(UsageError, match="no such curriculum"):
        stages_of("nonsense")


def test_a_broken_checkpoint_is_refused(tmp_path):
    trainer = trainer_of(config_of(tmp_path))
    trainer.run()
    path = RunFiles(tmp_path).checkpoint
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="not a checkpoint of a run"):
        trainer_of(config_of(tmp_path)).restore()


def test_settings_that_do_not_fit_are_refused():
    def config(**changes):
        return LMTrainConfig(data=(Path("text"),), **changes)

    for bad in (
        {"max_seconds": 0.0},
        {"max_seconds": float("nan")},
        {"learning": LearningSettings(lr=-1.0)},
        {"learning": LearningSettings(ema=1.0)},
        {"learning": LearningSettings(batch_size=0)},
        {"size": SizeSettings(model_dim=0)},
        {"watch": WatchSettings(log_every=0)},
    ):
        with pytest.raises(UsageError):
            config(**bad)
    with pytest.raises(UsageError, match="neither"):
        LMTrainConfig()
    for name in ("bogus=1", "mixer.bogus=1", "d_model"):
        with pytest.raises(UsageError):
            config(size=SizeSettings(set=(name,))).model_config()
    chosen = config(size=SizeSettings(set=("mixer.pattern=interference,attention",)))
    assert chosen.model_config().mixer.pattern == ("interference", "attention")
    improved = config(preset="improved").model_config()
    assert (improved.d_model, improved.n_layers, improved.n_heads) == (768, 12, 12)
    assert (improved.memory.global_tokens, improved.weights.lora_rank) == (16, 32)


def test_steps_and_seconds_together_still_reach_the_highest_rate(tmp_path):
    """With far more steps than there is time for, the warm-up is over in its share of the time."""
    schedule = Schedule(steps=100_000, seconds=100.0)
    rates = [schedule.rate(step, float(step)) for step in range(100)]
    assert max(rates) == 1.0
    assert rates.index(1.0) <= 2


def test_a_checkpoint_of_a_model_that_the_run_never_has_is_refused(tmp_path):
    trainer = trainer_of(config_of(tmp_path))
    trainer.run()
    groups, facts = read_checkpoint(RunFiles(tmp_path).checkpoint)
    other = ByteModel(dataclasses.replace(SMALL, n_layers=SMALL.n_layers + 1))
    groups["model"], facts["model"] = other.state_dict(), other.config.to_dict()
    write_checkpoint(RunFiles(tmp_path).checkpoint, groups, facts)
    with pytest.raises(ConfigError, match="another architecture"):
        trainer_of(config_of(tmp_path)).restore()


def test_a_term_is_averaged_over_the_steps_that_had_it(tmp_path):
    """A line that covers the border of a stage shows the term of the later one undiluted."""
    stages = [{"name": "one", "scale": 0}, {"name": "two", "losses": {"coherence": 0.5}}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    straddling = config_of(tmp_path / "run", stages=str(tmp_path / "stages.json"))
    trainer = trainer_of(straddling)
    seen, take = [], trainer.learner.take_terms

    def taken():
        counts = dict(trainer.learner.counts)
        seen.append((counts, take()))
        return seen[-1][1]

    trainer.learner.take_terms = taken
    trainer.run()
    steps = [(counts.get("coherence", 0), counts["cross_entropy"]) for counts, _ in seen]
    assert steps == [(0, 4), (2, 4), (4, 4)]
    assert seen[1][1]["coherence"] > 0.7 * seen[2][1]["coherence"]


def test_learned_weights_of_losses_survive_growth(tmp_path):
    stages = [{"name": "narrow"}, {"name": "wide", "d_model": 32}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    losses = LossConfig(coherence=0.1, weighting="uncertainty")
    trainer = trainer_of(config_of(tmp_path, losses=losses, stages=str(tmp_path / "stages.json")))
    with torch.no_grad():
        trainer.learner.objective.log_variance["coherence"].fill_(0.75)
    trainer.progress.step = 1
    trainer._enter(1)
    assert trainer.learner.model.config.d_model == 32
    assert trainer.learner.objective.log_variance["coherence"].item() == 0.75
