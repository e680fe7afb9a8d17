"""Several matrices that read the same vectors, applied in as few products as possible.

One product serves all: whole matrices, first factors and pivot rows are stacked and multiply x at
once. Second factors follow, one product each. A `Site` holds the one or two programs that are
cheapest for few and for many tokens.

>>> forms = (Whole(torch.ones(1, 2)), Factors(torch.ones(2, 1), torch.ones(1, 2)))
>>> Program(forms, "plain")(torch.ones(1, 2)).tolist()
[[2.0, 2.0, 2.0]]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.runtime.costs import DeviceCosts, arranged
from qll.runtime.direct import Direct
from qll.runtime.forms import Coded, Contracted, Factors, Form, Pivoted, Whole, seconds, stackable
from qll.runtime.kernels import CODED, KERNELS

# A second program is kept only for a gain of this share, since it holds the weights once more.
WORTH = 0.03


class Program(Direct):
    """One choice of forms for the matrices of a site; gives their outputs one behind another."""

    def __init__(self, forms: Sequence[Form], kernel: str | Callable[[int, int], str]) -> None:
        """kernel: the name of one for all products, or a function of (out, in) that gives it."""
        super().__init__()
        self.outs = tuple(form.shape[0] for form in forms)
        if stackable(forms):
            self.first, self.widths = _coded_kernel(forms), self.outs
            self.tails, self.simple = nn.ModuleList(_Same() for _ in forms), True
            return
        heads = [_head(form) for form in forms]
        self.widths = tuple(0 if head is None else head.shape[0] for head in heads)
        stacked = [head for head in heads if head is not None]

        def make(matrix: Tensor) -> nn.Module:
            name = kernel if isinstance(kernel, str) else kernel(*matrix.shape)
            return KERNELS[name](matrix)

        self.first = make(_stacked(stacked)) if stacked else None
        self.tails = nn.ModuleList(_tail(form, make) for form in forms)
        self.simple = all(isinstance(form, Whole) for form in forms)

    def pieces(self, x: Float[Tensor, "tokens into"]) -> list[Float[Tensor, "tokens _"]]:
        """The output of every matrix."""
        if self.simple:
            return list(self.first.forward(x).split_with_sizes(self.outs, 1))
        return [arranged(parts) for parts in self._parts(x)]

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """All outputs, joined."""
        if self.simple:
            # three modules inside each other cost as much as a small product: no calls with hooks
            return self.first.forward(x)
        return arranged(list(itertools.chain.from_iterable(self._parts(x))))

    def _parts(self, x: Tensor) -> list[list[Tensor]]:
        """The output of every matrix, in parts that lie side by side."""
        if self.first is None:
            bonds = (x,) * len(self.widths)
        else:
            bonds = self.first.forward(x).split_with_sizes(self.widths, 1)
        return [tail.forward(x, bond) for tail, bond in zip(self.tails, bonds, strict=True)]


class _Same(Direct):
    """The product with x is the output."""

    def forward(self, x: Tensor, bond: Tensor) -> list[Tensor]:
        return [bond]


class _Left(Direct):
    """A times the bond."""

    def __init__(self, left: nn.Module) -> None:
        super().__init__()
        self.left = left

    def forward(self, x: Tensor, bond: Tensor) -> list[Tensor]:
        return [self.left.forward(bond)]


class _Rest(Direct):
    """The bond itself is the pivot rows; C times it are the others."""

    def __init__(self, rest: nn.Module | None, order: Tensor | None) -> None:
        super().__init__()
        self.rest = rest
        self.register_buffer("order", order)

    def forward(self, x: Tensor, bond: Tensor) -> list[Tensor]:
        pieces = [bond] if self.rest is None else [bond, self.rest.forward(bond)]
        return pieces if self.order is None else [arranged(pieces, self.order)]


class Network(Direct):
    """A contraction of its own on x."""

    def __init__(self, form: Contracted) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, bond: Tensor) -> list[Tensor]:
        return [self.form(x)]


class _Kernel(Direct):
    """A kernel on x, for matrices whose codes stay packed."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor, bond: Tensor) -> list[Tensor]:
        return [self.kernel.forward(x)]


class Site(Direct):
    """The matrices that read one vector of a block, in the cheapest form for every token count."""

    def __init__(self, programs: Sequence[Program], few: int) -> None:
        super().__init__()
        self.programs = nn.ModuleList(programs)
        self.few = few
        # a look into a list of modules costs as much as a small product
        self._ends = (programs[0], programs[-1])

    @property
    def outs(self) -> tuple[int, ...]:
        """Length of every matrix's output."""
        return self._ends[0].outs

    def program(self, tokens: int) -> Program:
        """What runs for so many tokens."""
        return self._ends[tokens > self.few]

    def pieces(self, x: Float[Tensor, "tokens into"]) -> list[Float[Tensor, "tokens _"]]:
        """The output of every matrix."""
        return self.program(x.shape[0]).pieces(x)

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """All outputs, joined."""
        return self.program(x.shape[0]).forward(x)


def choose(
    candidates: Sequence[Sequence[Form]], costs: DeviceCosts
) -> tuple[list[tuple[Form, ...]], int]:
    """The one or two combinations of forms to keep, and up to how many tokens the first is used.

    candidates: the forms of every matrix, the last of each being the dense matrix. The first
    combination is the cheapest for one token; the second, if it is worth its memory, is the one
    that together with the first is cheapest relative to the dense matrices, averaged over token
    counts. Dense matrices are among the combinations, so by the measured costs none loses to them.
    """
    combinations = list(itertools.product(*candidates))
    grid = costs.tokens
    table = [[seconds(forms, count, costs) for count in grid] for forms in combinations]
    dense = table[-1]
    few = min(range(len(table)), key=lambda place: table[place][0])

    def together(place: int) -> float:
        return sum(
            min(a, b) / d for a, b, d in zip(table[few], table[place], dense, strict=True)
        ) / len(grid)

    many = min(range(len(table)), key=together)
    slower = any(a > d * (1 + WORTH) for a, d in zip(table[few], dense, strict=True))
    if together(few) - together(many) < WORTH and not slower:
        many = few
    if many == few:
        return [combinations[few]], grid[-1]
    better = [a <= b for a, b in zip(table[few], table[many], strict=True)]
    last = better.index(False) if False in better else len(grid)
    return [combinations[few], combinations[many]], grid[last - 1]


def _stacked(matrices: list[Tensor]) -> Tensor:
    """The matrices one below another; one alone is not copied."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _coded_kernel(forms: Sequence[Coded]) -> nn.Module:
    """The kernel of the codes of all `forms`, one below another."""
    codes, scales = (_stacked([getattr(f, part) for f in forms]) for part in ("codes", "scales"))
    return CODED[forms[0].kernel](codes, scales, forms[0].group)


def _head(form: Form) -> Tensor | None:
    """What multiplies x together with the others'."""
    if isinstance(form, Whole):
        return form.matrix
    return form.right if isinstance(form, Factors | Pivoted) else None


def _tail(form: Form, make: Callable[[Tensor], nn.Module]) -> nn.Module:
    if isinstance(form, Whole):
        return _Same()
    if isinstance(form, Factors):
        return _Left(make(form.left))
    if isinstance(form, Pivoted):
        return _Rest(make(form.rest) if form.rest.numel() else None, form.order)
    return _Kernel(_coded_kernel([form])) if isinstance(form, Coded) else Network(form)
