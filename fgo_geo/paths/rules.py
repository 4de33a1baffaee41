r"""Rules: the direction of a step, from a tangent gradient and a buffer; and the hyper-parameters of a step.

A rule is one pure function of a point, its tangent gradient, a buffer and the :class:`StepOptions`. All other parts of
a step (projection, norms, step size, retraction) are the same for every rule. An optimiser with a custom rule is a
subclass with one line, ``rule = staticmethod(my_rule)``. It takes the reference path, because the fused paths implement
only :func:`momentum_sgd`, and plain parameters keep the step of :class:`torch.optim.SGD` unless they are adapted. For
:func:`fgo_geo.on_manifolds` the displacement of another optimiser is the gradient, with momentum zero.

The rule transports momentum by projection at the start of the next step, when the tangent space of the new point is
known, and not at the end of the current step. Both give the same numbers; a stored buffer is tangent at the point from
which its step started. Manifolds of Geoopt define another transport, at the end of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import geoopt
import torch
from torch import Tensor

from fgo_geo.manifolds import EmbeddedManifold

__all__ = ["Rule", "StepOptions", "StepSize", "Update", "momentum_sgd"]

StepSize = Literal["theorem", "constant", "angle"]
Update = Literal["retraction", "exponential"]


class Rule(Protocol):
    """A pure function from a point, its tangent gradient and a buffer to a direction and the next buffer."""

    def __call__(
        self, manifold: geoopt.Manifold, x: Tensor, grad: Tensor, buffer: Tensor | None, options: StepOptions
    ) -> tuple[Tensor, Tensor | None]:
        """The direction to move against, and the new buffer; None leaves the buffer as it is.

        The buffer of a first step is None.
        """
        ...


def momentum_sgd(
    manifold: geoopt.Manifold, x: Tensor, grad: Tensor, buffer: Tensor | None, options: StepOptions
) -> tuple[Tensor, Tensor | None]:
    r"""The direction of SGD: ``b <- μ P_x(b) + (1 - d) g``, and ``b``, or Nesterov's ``g + μ b``.

    Args:
        manifold: The manifold of ``x``.
        x: Points.
        grad: Tangent vectors at ``x``: the Riemannian gradient divided by ``τ``.
        buffer: Momentum of the step before, or None in the first one, whose buffer is ``g``.
        options: Hyper-parameters; momentum ``μ``, dampening ``d`` and ``nesterov`` are read.

    Returns:
        The direction and the new buffer.

    Example:
        >>> from fgo_geo import ScaledSphere
        >>> x, g, b = torch.tensor([[1.0, 0.0], [0.0, 4.0], [5.0, 2.0]])
        >>> momentum_sgd(ScaledSphere(), x, g, b, StepOptions(lr=0.1, momentum=0.5))[0]
        tensor([0., 5.])
    """
    if options.momentum == 0:
        return grad, None
    if buffer is None:
        buffer = grad
    else:
        carried = manifold.proju(x, buffer) if isinstance(manifold, EmbeddedManifold) else buffer
        own = (1 - options.dampening) * grad if options.dampening else grad
        buffer = torch.add(own, carried, alpha=options.momentum)
    return (grad + options.momentum * buffer if options.nesterov else buffer), buffer


@dataclass(frozen=True)
class StepOptions:
    """The hyper-parameters of one step, of one parameter group.

    Attributes:
        lr: Learning rate; a tensor where reading it would wait for the device.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        nesterov: Nesterov momentum.
        weight_decay: Weight decay of plain parameters and Euclidean components.
        maximize: Ascend instead of descend.
        step_size: How the factor ``1/τ`` follows from ``R``.
        rho: Bound on the distance to the minimum.
        curvature: Bound on the sectional curvature; None for the manifolds' own.
        angle: With ``step_size="angle"``, radians per unit of learning rate.
        radius_invariant: Measure ``R`` on the manifolds of radius one.
        update: Move along the retraction or the exponential map.
        longest_step: Bound on the length of a step per unit of learning rate; infinite if there is none.
        foreach: For plain parameters, as in :class:`torch.optim.SGD`.
        fused: For plain parameters, as in :class:`torch.optim.SGD`.
        rule: How gradient and buffer become a direction.
    """

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False
    step_size: StepSize = "constant"
    rho: float = 1.0
    curvature: float | None = 1.0
    angle: float = 1.0
    radius_invariant: bool = False
    update: Update = "retraction"
    longest_step: float = math.inf
    foreach: bool | None = None
    fused: bool | None = None
    rule: Rule = momentum_sgd

    @cached_property  # a call in every step otherwise
    def keeps_buffer(self) -> bool:
        """Whether a weight has a buffer between steps; a rule of one's own may use one at any momentum."""
        return self.momentum != 0 or self.rule is not momentum_sgd
