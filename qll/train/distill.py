"""The loss of distillation: KL(teacher || student) of next-token distributions.

Both models share the frozen output matrix, so the loss is a function of two final hidden states.
Its gradient with respect to the student's is (softmax_student - softmax_teacher) times the matrix:
computed in the forward pass a few positions at a time, since the logits of one window of 1,024
tokens over a vocabulary of 128,256 would take half a gigabyte, three times over.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Bytes of float32 logits that are held at a time: below the 32 MB from which the C library maps
# every array anew (qll.train.memory).
CHUNK_BYTES = 16 << 20


def distillation_loss(
    student: Float[Tensor, "*tokens d_model"],
    teacher: Float[Tensor, "*tokens d_model"],
    student_head: Float[Tensor, "vocab d_model"],
    teacher_head: Float[Tensor, "vocab d_model"],
) -> Float[Tensor, ""]:
    """Mean KL(teacher || student) in nats per token; gradients reach `student` only.

    Products run in the dtype of the heads, softmaxes in float32.

    >>> state, head = torch.randn(5, 3), torch.randn(7, 3)
    >>> bool(distillation_loss(state, state, head, head).abs() < 1e-6)
    True
    """
    return _Distillation.apply(student, teacher, student_head, teacher_head)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor
    ) -> Tensor:
        kind, width = student_head.dtype, student.shape[-1]
        states = student.detach().reshape(-1, width).to(kind)
        wanted = teacher.reshape(-1, width).to(teacher_head.dtype)
        slope, total = torch.empty_like(states), torch.zeros((), device=states.device)
        step = max(1, CHUNK_BYTES // (4 * len(student_head)))
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            found = torch.log_softmax((states[part] @ student_head.T).float(), dim=-1)
            target = torch.log_softmax((wanted[part] @ teacher_head.T).float(), dim=-1)
            weight = target.exp()
            total += (weight * (target.sub_(found))).sum()
            slope[part] = found.exp_().sub_(weight).to(kind) @ student_head
        ctx.save_for_backward(slope)
        ctx.like = (student.shape, student.dtype)
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        shape, kind = ctx.like
        gradient = slope.float() * (above / len(slope))
        return gradient.reshape(shape).to(kind), None, None, None
