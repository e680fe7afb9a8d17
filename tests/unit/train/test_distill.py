"""The distillation loss against torch's own KL divergence, value and gradient."""

from __future__ import annotations

import torch

from qll.train import distill, distillation_loss


def problem(tokens: int = 7):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, tokens, 5, generator=generator) for _ in range(2))
    heads = [torch.randn(11, 5, generator=generator) for _ in range(2)]
    return student.requires_grad_(), teacher, *heads


def by_torch(student, teacher, student_head, teacher_head):
    found = torch.log_softmax(student @ student_head.T, -1).flatten(0, 1)
    wanted = torch.log_softmax(teacher @ teacher_head.T, -1).flatten(0, 1)
    return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def test_value_and_gradient_are_those_of_torch():
    student, *rest = problem()
    ours, theirs = distillation_loss(student, *rest), by_torch(student, *rest)
    torch.testing.assert_close(ours, theirs)
    (mine,) = torch.autograd.grad(3 * ours, student)
    (reference,) = torch.autograd.grad(3 * theirs, student)
    torch.testing.assert_close(mine, reference)


def test_chunks_do_not_change_it(monkeypatch):
    student, *rest = problem()
    whole = distillation_loss(student, *rest)
    (slope,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(distill, "CHUNK_BYTES", 3 * 4 * 11)
    parts = distillation_loss(student, *rest)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, student)[0], slope)


def test_nothing_reaches_the_teacher():
    student, teacher, *heads = problem()
    teacher.requires_grad_()
    distillation_loss(student, teacher, *heads).backward()
    assert teacher.grad is None
    assert all(head.grad is None for head in heads)
