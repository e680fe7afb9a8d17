"""Block refinement on the tiny Llama: it helps, it is resumable, it leaves what is exact alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from qll.convert import RefineSettings, convert_units, make_plan, measured_again, refine
from qll.convert.assemble import block_tensors
from qll.errors import TextError
from qll.load import open_source
from qll.model.blocks import build_block, build_network_block, run_block
from qll.options import ConvertOptions
from tests.conftest import VOCAB

WINDOWS = torch.randint(0, VOCAB, (64, 24), generator=torch.Generator().manual_seed(1))
SETTINGS = RefineSettings(passes=4, rate=2e-3, batch_tokens=48)
CPU = torch.device("cpu")


def prepared(folder, work, keep=0.5, **options):
    source = open_source(folder)
    chosen = ConvertOptions(keep=keep, metric="plain", **options)
    plan = make_plan(source, None, chosen)
    records = convert_units(source, None, plan, chosen, work / "cores", work / "events.jsonl")
    return source, plan, chosen, records


def refined(job, work, settings=SETTINGS, windows=WINDOWS):
    source, plan, options, _ = job
    return refine(
        source, plan, options, None, windows, work / "cores", work / "refined", settings, CPU
    )


def test_every_block_ends_nearer_to_the_dense_one(tiny_hf_folder, tmp_path):
    facts = refined(prepared(tiny_hf_folder, tmp_path, format="lowrank"), tmp_path)
    assert [line["block"] for line in facts] == [0, 1]
    assert all(line["error_after"] < 0.97 * line["error_before"] for line in facts)


def test_resumed_after_one_block_it_leaves_the_same_bytes(tiny_hf_folder, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    facts = refined(prepared(tiny_hf_folder, whole), whole)
    job = prepared(tiny_hf_folder, broken)
    refined(job, broken)
    (broken / "refined" / "block.0001.safetensors").unlink()
    assert refined(job, broken) == facts
    for name in ("block.0000.safetensors", "block.0001.safetensors"):
        assert (whole / "refined" / name).read_bytes() == (broken / "refined" / name).read_bytes()


def test_finished_blocks_are_not_run_again(tiny_hf_folder, tmp_path, monkeypatch):
    job = prepared(tiny_hf_folder, tmp_path)
    facts = refined(job, tmp_path)
    monkeypatch.setattr("qll.convert.refinement._Run.step", None)
    assert refined(job, tmp_path) == facts


def test_of_two_windows_one_is_held_out_and_one_window_is_refused(tiny_hf_folder, tmp_path):
    job = prepared(tiny_hf_folder, tmp_path)
    assert len(refined(job, tmp_path, windows=WINDOWS[:2])) == 2
    with pytest.raises(TextError, match="too little text to refine on"):
        refined(job, tmp_path / "one", windows=WINDOWS[:1])


def test_streams_on_disk_give_the_same(tiny_hf_folder, tmp_path, monkeypatch):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    facts = refined(prepared(tiny_hf_folder, memory), memory)
    monkeypatch.setattr("qll.calibrate.streams.MEMORY_LIMIT", 0)
    assert refined(prepared(tiny_hf_folder, disk), disk) == facts


def test_what_is_exact_stays_as_it_is(tiny_hf_folder, tmp_path):
    job = prepared(tiny_hf_folder, tmp_path, keep=1.0, format="dense")
    facts = refined(job, tmp_path)
    assert all(line["best_pass"] == 0 for line in facts)
    assert all(line["error_after"] < 1e-5 for line in facts)


def test_folded_gains_are_not_trained(tiny_hf_folder, tmp_path):
    refined(prepared(tiny_hf_folder, tmp_path, norms="fold"), tmp_path)
    values = load_file(tmp_path / "refined" / "block.0000.safetensors")
    gain = values["model.layers.0.input_layernorm.weight"]
    assert torch.equal(gain, torch.ones_like(gain))


def test_errors_are_measured_on_the_trained_tensors(tiny_hf_folder, tmp_path):
    job = prepared(tiny_hf_folder, tmp_path)
    source, plan, options, records = job
    refined(job, tmp_path)
    folders = (tmp_path / "cores", tmp_path / "refined")
    again = measured_again(source, None, plan, options, *folders, records)
    assert [record["name"] for record in again] == [record["name"] for record in records]
    changed = [a["rel_error"] != r["rel_error"] for a, r in zip(again, records, strict=True)]
    assert any(changed)
    same = measured_again(source, None, plan, options, tmp_path / "cores", tmp_path, records)
    for one, other in zip(same, records, strict=True):
        assert abs(one["rel_error"] - other["rel_error"]) < 1e-6


def test_a_block_of_networks_is_the_block_it_stands_for(tiny_hf_folder, tmp_path):
    source, plan, options, _ = prepared(tiny_hf_folder, tmp_path, keep=1.0, format="lowrank")
    entries = {e.unit.members: e.spec for e in plan.of_block(1) if e.spec is not None}
    tensors = block_tensors(source, plan, options, tmp_path / "cores", 1)
    block = build_network_block(source.config, 1, entries, tensors)
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        run_block(block, hidden), run_block(build_block(source, 1), hidden), atol=2e-4, rtol=2e-4
    )
