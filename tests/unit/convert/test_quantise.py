"""The quantising stage: packed folders open, verify, export, resume, and refuse what is broken."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qll import store
from qll.convert import assemble, convert_units, packings_of, quantise_units
from qll.convert.plan import Plan, PlanEntry
from qll.convert.units import group_unit, single_units
from qll.errors import CheckpointError, ConfigError, IntegrityError
from qll.evaluate import bytes_by_dtype, count_params, forward_flops
from qll.load import open_source
from qll.model import (
    PackedLinear,
    PackedTensor,
    TNConfig,
    commit_folder,
    export_dense,
    export_two_linear,
    load,
    write_static_files,
)
from qll.options import ConvertOptions
from qll.report import compression_section
from qll.tn import tensor_shapes
from qll.tn.network import NetworkSpec
from qll.tn.packed import Packing


def make_plan(config) -> Plan:
    """Low rank, a joint tree, an MPO and dense matrices side by side; the vocabulary dense."""
    entries = []
    for block in range(config.num_hidden_layers):
        for unit in single_units(config, block)[3:4] + single_units(config, block)[6:]:
            spec = NetworkSpec("lowrank", unit.shapes[0], (20,), gauge="interpolative")
            entries.append(PlanEntry(unit, spec if block == 0 else None, 0.0))
        for unit in single_units(config, block)[:3]:
            entries.append(PlanEntry(unit, None, 0.0))
        pair = group_unit(config, block, "gate_up")
        spec = NetworkSpec("joint_tree", (256, 64), (40, 40, 40), members=pair.shapes)
        entries.append(PlanEntry(pair, spec.with_gauge("interpolative"), 0.0))
    from qll.convert.units import embedding_unit, head_unit

    entries += [PlanEntry(unit(config), None, 0.0) for unit in (embedding_unit, head_unit)]
    return Plan(tuple(entries), 0.8, "plain", 0)


@pytest.fixture(scope="module", params=[3, 4, 8])
def made(request, tiny_hf_folder, tmp_path_factory):
    """A packed folder of the tiny Llama with everything it came from."""
    base = tmp_path_factory.mktemp("packed")
    options = ConvertOptions(metric="plain", bits=request.param)
    source = open_source(tiny_hf_folder)
    plan = make_plan(source.config)
    work, model, events = base / "cores", base / "model", base / "events.jsonl"
    records = convert_units(source, None, plan, options, work, events)
    records = quantise_units(source, None, plan, options, work, None, events, records)
    finish(source, plan, options, work, model)
    return SimpleNamespace(**locals())


def finish(source, plan, options, work, model):
    store.make_folder(model)
    assemble(source, plan, options, work, model)
    entries = {e.unit.members: e.spec for e in plan.entries if e.spec is not None}
    packings = packings_of(plan, options)
    write_static_files(model, source, None, entries, dtype=torch.float32, packings=packings)
    commit_folder(model, {"source": source.fingerprint})


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits


def tensors_of(folder):
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def change(folder, out, function):
    """A copy of `folder` in which `function(name, tensor)` replaced tensors (None drops one)."""
    copied = shutil.copytree(folder, out)
    for path in copied.glob("*.safetensors"):
        changed = {k: function(k, v) for k, v in load_file(path).items()}
        save_file({k: v for k, v in changed.items() if v is not None}, path)
    return copied


def test_bytes_on_disk_are_the_closed_form(made):
    packing = Packing(made.options.bits, 32)
    wanted = 0
    for entry in made.plan.entries:
        if entry.unit.block is None:
            continue
        if entry.spec is None:
            wanted += sum(packing.num_bytes(shape) for shape in entry.unit.shapes)
        else:
            shapes = tensor_shapes(entry.spec)
            wanted += sum(packing.num_bytes(shape) for shape in shapes.cores)
            wanted += 4 * sum(shape[0] for shape in shapes.indices)
    stored = tensors_of(made.model)
    linears = {k: v for k, v in stored.items() if ".self_attn." in k or ".mlp." in k}
    assert sum(tensor.nbytes for tensor in linears.values()) == wanted
    kinds = {k.rpartition(".")[2]: v.dtype for k, v in linears.items() if ".indices." not in k}
    assert kinds == {"packed": torch.uint8, "scales": torch.bfloat16}
    recorded = sum(r["bytes"] for r in made.records if "bytes" in r)
    assert recorded == pytest.approx(wanted, abs=len(made.records))


def test_the_report_counts_packed_numbers_and_bytes(made):
    plan, source = made.plan, made.source
    facts = {"matrices": made.records, "training": {}}
    section = compression_section(source, plan, facts, made.model, "float32")
    dense = sum(e.unit.dense_params for e in plan.entries if e.unit.block is not None)
    assert section["keep"] == pytest.approx(plan.block_params / dense)
    stored = tensors_of(made.model)
    assert section["bytes"]["converted"] == sum(tensor.nbytes for tensor in stored.values())
    linears = sum(t.nbytes for k, t in stored.items() if ".self_attn." in k or ".mlp." in k)
    assert section["block_bits_per_weight"] == pytest.approx(8 * linears / dense)
    packed = [r for r in section["per_matrix"] if "bits" in r]
    assert len(packed) == 14
    # what was left dense now has the error of its rounding
    assert all(0 < r["metric_error"] < 1 for r in packed)


def test_the_loaded_model_is_counted_the_same_way(made):
    model = load(made.model)
    assert count_params(model).blocks == made.plan.block_params
    stored = tensors_of(made.model)
    assert sum(bytes_by_dtype(model).values()) == sum(t.nbytes for t in stored.values())
    assert forward_flops(model, 1, 1) > 0


def test_it_opens_and_computes_what_the_export_computes(made, tmp_path):
    model = load(made.model)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 8
    assert sum(isinstance(module, PackedTensor) for module in model.modules()) == 8 + 2 * 2 + 2 * 2
    plain = LlamaForCausalLM.from_pretrained(export_dense(made.model, tmp_path / "dense"))
    torch.testing.assert_close(logits(model), logits(plain), atol=2e-5, rtol=0)
    auto = AutoModelForCausalLM.from_pretrained(made.model)
    torch.testing.assert_close(logits(model), logits(auto), atol=0, rtol=0)
    torch.testing.assert_close(logits(auto.dequantize()), logits(plain), atol=2e-5, rtol=0)
    half = load(made.model, dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16


def test_eight_bits_are_close_to_the_float_model(made, tmp_path):
    floats = ConvertOptions(metric="plain")
    finish(made.source, made.plan, floats, made.work, tmp_path / "float")
    wanted, found = logits(load(tmp_path / "float")), logits(load(made.model))
    spread = (wanted - wanted.mean()).square().mean().sqrt()
    drift = (found - wanted).square().mean().sqrt() / spread
    assert drift < {3: 0.9, 4: 0.45, 8: 0.03}[made.options.bits]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_low_rank_pairs_are_exported(made, tmp_path):
    out = export_two_linear(made.model, tmp_path / "pairs")
    modules = json.loads((out / "two_linear.json").read_text())["modules"]
    assert set(modules) == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    }
    pair = [
        tensors_of(out)[modules["model.layers.0.mlp.down_proj"][k]] for k in ("second", "first")
    ]
    weight = load(made.model).model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(pair[0] @ pair[1], weight, atol=1e-5, rtol=0)


def test_saved_again_it_is_the_same_folder(made, tmp_path):
    model = load(made.model)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(made.model), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(before[k].dtype == after[k].dtype for k in before)
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(model), atol=0, rtol=0)


def test_copies_and_changed_buffers_are_never_stale(made):
    model = load(made.model)
    before = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(twin), before, atol=0, rtol=0)
    linear = next(m for m in model.modules() if isinstance(m, PackedLinear))
    assert linear.weight is linear.weight
    old = linear.weight.clone()
    linear.scales.mul_(2)
    torch.testing.assert_close(linear.weight, 2 * old)
    linear.to(torch.float64)
    assert linear.weight.dtype == torch.float64
    with torch.inference_mode():
        inside = linear.scales.clone()
    linear.scales = inside
    torch.testing.assert_close(linear.weight, 2 * old.double())


def test_a_killed_stage_resumes_to_the_same_bytes(made, tmp_path):
    work = shutil.copytree(made.work, tmp_path / "cores")
    journal = work / "packed.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:20])
    files = sorted(work.glob("*.packed.safetensors"))
    files[-1].unlink()
    files[-2].write_bytes(files[-2].read_bytes()[:-5])
    floats = convert_units(made.source, None, made.plan, made.options, work, tmp_path / "e.jsonl")
    records = quantise_units(
        made.source, None, made.plan, made.options, work, None, tmp_path / "e.jsonl", floats
    )
    assert records == made.records
    events = (tmp_path / "e.jsonl").read_text().count('"packed"')
    assert 0 < events < 14
    for path in files:
        assert path.read_bytes() == (made.work / path.name).read_bytes()


def test_cores_that_changed_are_packed_again(made, tmp_path):
    """Refinement writes cores after they were first fitted: what was packed before is not kept."""
    work = shutil.copytree(made.work, tmp_path / "cores")
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(work / f"{name}.safetensors")
    tensors[f"{name}.cores.0"] *= 1.5
    store.write_tensors(work / f"{name}.safetensors", tensors)
    quantise_units(
        made.source, None, made.plan, made.options, work, None, tmp_path / "e.jsonl", made.records
    )
    packed = f"{name}.packed.safetensors"
    assert (work / packed).read_bytes() != (made.work / packed).read_bytes()
    assert (tmp_path / "e.jsonl").read_text().count('"packed"') == 1


def test_without_bits_nothing_is_packed(made, tmp_path):
    options = ConvertOptions(metric="plain")
    assert packings_of(made.plan, options) == {}
    records = quantise_units(
        made.source, None, made.plan, options, tmp_path, None, tmp_path / "e.jsonl", made.records
    )
    assert records == made.records
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["packed", "scales"])
def test_truncated_or_missing_parts_are_refused(made, part, tmp_path):
    for word, wanted in ((f"v_proj.{part}", "v_proj"), (f"down_proj.cores.0.{part}", "down_proj")):
        cut = change(
            made.model,
            tmp_path / f"cut_{wanted}",
            lambda name, tensor, word=word: tensor[:-1] if name.endswith(word) else tensor,
        )
        with pytest.raises(IntegrityError, match=rf"wrong shape.*{wanted}"):
            load(cut, verify=False)
        with pytest.raises(CheckpointError, match=r"another size|has changed"):
            load(cut)
        gone = change(
            made.model,
            tmp_path / f"gone_{wanted}",
            lambda name, tensor, word=word: None if name.endswith(word) else tensor,
        )
        with pytest.raises(IntegrityError, match=wanted):
            load(gone, verify=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_named(made, value, tmp_path):
    def spoil(name, tensor):
        if name.endswith("0.mlp.gate_up.cores.1.scales"):
            tensor[0, 0] = value
        return tensor

    bad = change(made.model, tmp_path / "bad", spoil)
    with pytest.raises(IntegrityError, match=r"gate_up\.cores\.1\.scales: scales .* not finite"):
        load(bad, verify=False)
    store.write_manifest(bad, {})
    with pytest.raises(IntegrityError, match="not finite"):
        export_dense(bad, tmp_path / "out")


@pytest.mark.parametrize(
    ("packed", "match"),
    [
        ({"model.layers.0.self_attn.q_proj": {"bits": 5, "group": 32}}, "packing cannot be read"),
        ({"model.layers.0.self_attn.q_proj": {"bits": "4", "group": 32}}, "packing cannot be read"),
        ({"model.layers.0.self_attn.q_proj": {"bits": 4}}, "packing cannot be read"),
        ({"model.layers.0.self_attn.q_proj": 4}, "packing cannot be read"),
        ({"model.layers.9.self_attn.q_proj": {"bits": 4, "group": 32}}, "no such matrix"),
        ({"model.embed_tokens": {"bits": 4, "group": 32}}, "only a Linear"),
        ({}, "missing|no place"),
    ],
)
def test_a_config_that_lies_about_packing_is_refused(made, packed, match, tmp_path):
    folder = shutil.copytree(made.model, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["packed"] = packed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        load(folder, verify=False)


def test_the_packing_is_in_the_config(made):
    config = json.loads((made.model / "config.json").read_text())["quantization_config"]
    wanted = {"bits": made.options.bits, "group": 32}
    assert config["packed"]["model.layers.0.mlp.gate_up"] == wanted
    assert config["packed"]["model.layers.1.mlp.down_proj"] == wanted
    assert TNConfig(**config).packings() == packings_of(made.plan, made.options)
    with pytest.raises(ConfigError, match="not a packing"):
        Packing(5, 32)
