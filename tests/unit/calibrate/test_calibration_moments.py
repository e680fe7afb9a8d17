"""Streamed moments equal those of one autograd pass through the whole model."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

from qll.calibrate import LINEARS, collect
from qll.calibrate.passes import loss_gradient
from qll.errors import UsageError
from qll.load import open_source

WINDOWS, CONTEXT = 3, 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Waiting for a second thread costs more than the tiny model does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (WINDOWS, CONTEXT), generator=generator)


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


class Reference:
    """Inputs and output gradients of every linear, from the whole model in float64."""

    def __init__(self, model, windows, labels="text"):
        self.model = copy.deepcopy(model).double()
        self.inputs, self.outputs, hooks = {}, {}, []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear) or name == "model.embed_tokens":
                hooks.append(module.register_forward_hook(self._keep(name)))
        self.result = self.model(windows, output_hidden_states=True)
        scored = self.result.logits[:, :-1].flatten(0, 1)
        wanted = windows[:, 1:].flatten() if labels == "text" else drawn(scored.softmax(-1))
        self.loss = torch.nn.functional.cross_entropy(scored, wanted, reduction="sum")
        self.loss.backward()

    def _keep(self, name):
        def hook(module, arguments, output):
            output.retain_grad()
            self.inputs[name], self.outputs[name] = arguments[0].detach(), output

        return hook

    def moment(self, name):
        rows = self.inputs[name].flatten(0, -2)
        return rows.T @ rows

    def grad_moment(self, name, low, high):
        total = 0
        for window in self.outputs[name].grad:
            kept = window[CONTEXT // 8 : -(CONTEXT // 8)]
            lengths = [float(row.norm()) for row in kept]
            mean = sum(lengths) / len(lengths)
            for row, length in zip(kept, lengths, strict=True):
                row = row * min(max(length, low * mean), high * mean) / length
                total = total + torch.outer(row, row)
        return total


def drawn(probabilities):
    """A label for every state but the last of each window, by the inverse of the distribution."""
    hands = [torch.Generator().manual_seed(number) for number in range(WINDOWS)]
    heights = torch.cat([torch.rand(CONTEXT - 1, generator=hand) for hand in hands]).double()
    return (probabilities.cumsum(-1) <= heights[:, None]).sum(-1)


@pytest.fixture(scope="module")
def reference(tiny_llama, windows):
    return Reference(tiny_llama, windows)


def assert_close(found, expected):
    assert found.dtype == torch.float64
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("clip", [(0.1, 10.0), (0.9, 1.1)])
def test_moments_equal_full_autograd(source, windows, reference, tmp_path, monkeypatch, clip):
    monkeypatch.setattr("qll.calibrate.probe.CLIP", clip)
    moments = collect(source, windows, tmp_path, gradients=True, labels="text")
    for index in range(2):
        block = moments.block(index)
        assert set(block) == {f"model.layers.{index}.{linear}" for linear in LINEARS}
        for name, linear in block.items():
            assert_close(linear.input, reference.moment(name))
            assert_close(linear.grad, reference.grad_moment(name, *clip))
            assert linear.tokens == WINDOWS * CONTEXT
            assert linear.grad_tokens == WINDOWS * (CONTEXT - 2 * (CONTEXT // 8))
    assert_close(moments.head().input, reference.moment("lm_head"))
    assert_close(moments.embedding_grad(), reference.grad_moment("model.embed_tokens", *clip))
    assert moments.head().grad is None
    mean_loss = reference.loss.item() / (WINDOWS * (CONTEXT - 1))
    assert moments.summary["nll"] == pytest.approx(mean_loss, rel=1e-6)


def test_labels_drawn_from_the_model(source, windows, tiny_llama, reference, tmp_path):
    wanted = Reference(tiny_llama, windows, "sampled")
    moments = collect(source, windows, tmp_path, gradients=True)
    for name, linear in moments.block(0).items():
        assert_close(linear.input, reference.moment(name))
        assert_close(linear.grad, wanted.grad_moment(name, 0.1, 10.0))
        other = reference.grad_moment(name, 0.1, 10.0)
        assert float((linear.grad - other).norm() / other.norm()) > 0.01
    assert moments.summary["labels"] == "sampled"
    mean_loss = reference.loss.item() / (WINDOWS * (CONTEXT - 1))
    assert moments.summary["nll"] == pytest.approx(mean_loss, rel=1e-6)


def test_gradients_of_drawn_labels_have_the_fisher_matrix_as_second_moment():
    hand = torch.Generator().manual_seed(0)
    weight, state = torch.randn(7, 3, generator=hand), torch.randn(1, 3, generator=hand)
    p = (state @ weight.T).softmax(-1)[0]
    fisher = weight.T @ (p.diag() - torch.outer(p, p)) @ weight
    draws = (torch.arange(4000) + 0.5) / 4000
    states = state.expand(4001, 3)
    gradients = loss_gradient(states, weight, torch.zeros(4000, dtype=torch.int64), draws)[1][:-1]
    torch.testing.assert_close(gradients.mean(0), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(gradients.T @ gradients / 4000, fisher, atol=5e-3, rtol=5e-3)


def test_clipping_matters_in_the_comparison_above(reference):
    name = "model.layers.0.mlp.down_proj"
    loose, tight = reference.grad_moment(name, 0, 1e9), reference.grad_moment(name, 0.9, 1.1)
    assert float((loose - tight).norm() / loose.norm()) > 0.01


def test_forward_only_gives_the_same_inputs_and_no_gradients(source, windows, tmp_path):
    both = collect(source, windows, tmp_path / "both", gradients=True)
    forward = collect(source, windows, tmp_path / "forward", gradients=False)
    assert not forward.gradients
    assert forward.embedding_grad() is None
    for name, linear in forward.block(1).items():
        assert linear.grad is None
        assert torch.equal(linear.input, both.block(1)[name].input)
    assert torch.equal(forward.head().input, both.head().input)
    assert forward.block_influence == pytest.approx(both.block_influence, rel=1e-6)


def test_influence_and_token_counts(source, windows, reference, tmp_path):
    moments = collect(source, windows, tmp_path, gradients=False)
    states = reference.result.hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1)
    assert moments.block_influence[0] == pytest.approx(1 - cosine.mean().item(), rel=1e-4)
    assert torch.equal(moments.token_counts, torch.bincount(windows.flatten(), minlength=512))


def test_layers_with_one_input_share_one_moment(source, windows, tmp_path):
    block = collect(source, windows, tmp_path, gradients=False).block(0)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert block[attention + "q_proj"].input is block[attention + "v_proj"].input
    assert block[mlp + "gate_proj"].input is block[mlp + "up_proj"].input
    assert block[attention + "o_proj"].input is not block[attention + "q_proj"].input


def test_moments_do_not_depend_on_how_windows_are_batched(source, windows, tmp_path):
    """Twice the same window: input moments double, gradient moments too (the loss is a sum)."""
    settings = {"gradients": True, "labels": "text"}
    once = collect(source, windows[:1], tmp_path / "once", **settings).block(0)
    twice = collect(source, windows[[0, 0]], tmp_path / "twice", **settings).block(0)
    for name, linear in once.items():
        torch.testing.assert_close(twice[name].input, 2 * linear.input, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(twice[name].grad, 2 * linear.grad, rtol=1e-6, atol=1e-9)


def test_one_block_in_memory(source, windows, tmp_path, monkeypatch):
    from qll.calibrate import passes

    blocks, alive = [], []
    build = passes.build_block

    def watched(*arguments, **options):
        alive.append(sum(block() is not None for block in blocks))
        block = build(*arguments, **options)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(passes, "build_block", watched)
    collect(source, windows, tmp_path, gradients=True)
    assert alive == [0, 0, 0, 0]


def test_one_linear_equals_its_part_of_the_block(source, windows, tmp_path):
    tiny_store = collect(source, windows, tmp_path, gradients=True)
    block = tiny_store.block(1)
    for path, whole in block.items():
        alone = tiny_store.linear(path)
        assert torch.equal(alone.input, whole.input)
        assert torch.equal(alone.grad, whole.grad)
        assert (alone.tokens, alone.grad_tokens) == (whole.tokens, whole.grad_tokens)
    with pytest.raises(UsageError, match="not a linear of a block"):
        tiny_store.linear("model.norm")
