r"""Rules: how a tangent gradient and what an optimiser remembers become a direction.

A rule is one pure function of a point, its tangent gradient and a buffer. Everything else of a step (projection, norms,
step size, retraction) is the same for every rule. The fused paths know :func:`momentum_sgd` alone, and with momentum
zero the displacement that another optimiser proposes is a gradient for it (:func:`fgo_geo.on_manifolds`). A rule of
your own takes the reference path.

Momentum is transported by projection, and lazily: the buffer is projected at the start of the next step, when the
target's tangent space is known, rather than at the end of this one. The numbers are the same; a stored buffer is
tangent at the point that its step started from. Manifolds of Geoopt define another transport, at the end of the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import geoopt
import torch
from torch import Tensor

from fgo_geo.manifolds import EmbeddedManifold

if TYPE_CHECKING:
    from fgo_geo.paths.protocol import StepOptions

__all__ = ["Rule", "momentum_sgd"]


class Rule(Protocol):
    """A pure function from a point, its tangent gradient and a buffer to a direction and the next buffer."""

    def __call__(
        self, manifold: geoopt.Manifold, x: Tensor, grad: Tensor, buffer: Tensor | None, options: StepOptions
    ) -> tuple[Tensor, Tensor | None]:
        """The direction to move against, and the new buffer (None if the rule keeps none)."""
        ...


def momentum_sgd(
    manifold: geoopt.Manifold, x: Tensor, grad: Tensor, buffer: Tensor | None, options: StepOptions
) -> tuple[Tensor, Tensor | None]:
    r"""The direction of SGD: ``b <- μ P_x(b) + (1 - d) g``, and ``b``, or Nesterov's ``g + μ b``.

    Args:
        manifold: Where ``x`` lives.
        x: Points.
        grad: Tangent vectors at ``x``: the Riemannian gradient divided by ``τ``.
        buffer: Momentum of the step before, or None in the first one, whose buffer is ``g``.
        options: Hyper-parameters; momentum ``μ``, dampening ``d`` and ``nesterov`` are read.

    Returns:
        The direction and the new buffer.

    Example:
        >>> from fgo_geo import ScaledSphere
        >>> from fgo_geo.paths.protocol import StepOptions
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
