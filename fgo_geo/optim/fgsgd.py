r"""FG-SGD: stochastic gradient descent on products of manifolds, with the step size of the convergence theorem.

:class:`RiemannianFGSGD` is the torch optimiser: it holds options and state, and collects the weights of every step with
their gradients and momentum. The step is in :mod:`fgo_geo.optim.base`, its options in :mod:`fgo_geo.optim.options`, its
formulas in :mod:`fgo_geo.paths.reference` and :mod:`fgo_geo.optim.step_size`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, overload

import geoopt
import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from fgo_geo.manifolds import STEPS_SHARDS
from fgo_geo.optim.base import Stepper, between_graphs, manifold_of
from fgo_geo.optim.options import OPTIONS, Norm, check_options, fill_in, step_options
from fgo_geo.optim.points import HALF, Held, Masters, StepScales, parameters_given
from fgo_geo.optim.requests import StepRequest
from fgo_geo.paths.protocol import StepOptions, StepSize, Update, Weight
from fgo_geo.paths.rules import momentum_sgd
from fgo_geo.weights.words import described

__all__ = ["RiemannianFGSGD"]


class RiemannianFGSGD(geoopt.optim.RiemannianSGD):
    r"""Riemannian SGD whose step size follows from the convergence theorem of FG-SGD.

    Every group ``G`` moves by ``-(lr / τ) grad`` with ``τ = ( max{1, R² (2 + R)²} )^{1/2}``, where ``R`` is the norm of
    its Riemannian gradient ([Ozay2019]_, eq. 7). A parameter on a single manifold is one group. With the defaults,
    steps on manifolds are never longer than ``(√2 - 1) lr`` (with momentum ``μ``: ``(√2 - 1) lr / (1 - μ)``) for any
    gradient.

    The optimiser works for every manifold of Geoopt. Plain parameters and those on :class:`geoopt.Euclidean` take the
    step of :class:`torch.optim.SGD`, bit for bit. The optimiser never writes to ``p.grad``. Weight decay acts on plain
    parameters and on Geoopt's own manifolds; on spheres, oblique and Stiefel manifolds it is normal to the manifold and
    projects to zero. If you convert or move a weight between steps (``model.double()``), its momentum follows.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate, a number or a tensor with one element.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: Weight decay (L2 penalty).
        nesterov: Nesterov momentum; needs momentum and zero dampening.
        stabilize: Project points and momentum once in so many steps; None for never, because steps correct rounding
            errors.
        step_size: ``"theorem"`` divides by ``τ``; ``"constant"`` does not; ``"angle"`` turns every group by ``angle``
            radians per unit of learning rate (Euclidean components take a constant step).
        angle: The angle, for ``step_size="angle"``.
        norm: The norm that determines ``τ``: ``"batch"`` is that of the current gradient, as in [Ozay2019]_;
            ``"running"`` is a mean over earlier steps, so that on average steps point along the mean gradient. It
            shortens steps of more than ten times the bound to this length, see :meth:`shortened_gradients`.
        rho: Bound ``ρ`` on the geodesic distance to the minimum.
        curvature: Bound ``c`` on the sectional curvature; None for eq. 7 (``c <= 1``), ``"manifold"`` for our
            manifolds' own ``1/r²`` (zero on Euclidean components, one on Geoopt's manifolds).
        radius_invariant: Measure ``R`` on the manifold of radius one, so that training at radius ``r`` is training at
            radius one with ``r`` times the weight in the forward pass. Eq. 7 measures ``R`` at the weight itself.
        update: ``"retraction"`` or ``"exponential"`` (map).
        adapt_euclidean: Also divide the steps of plain parameters by their own ``τ``.
        check_finite: Raise an error if a gradient on a manifold is not finite, before anything has changed. None does
            so on the CPU. Elsewhere, and with False, a group whose norm is not finite gets no gradient in this step and
            stays on its manifold, and :meth:`skipped_groups` counts it. Plain parameters are checked only with
            ``adapt_euclidean``.
        master_weights: Keep a single-precision copy of half-precision weights on manifolds in the state, and step this
            copy, so that rounding does not lose small steps. Otherwise the optimiser computes steps in single precision
            and rounds the weights.
        maximize: Ascend instead of descend.
        foreach, fused: For plain parameters, as in :class:`torch.optim.SGD`.

    Raises:
        TypeError: If ``params`` is a module or another object without parameters, or an option that must be a number is
            not.
        ValueError: If an option is out of range, a parameter does not lie on its manifold, or there are no parameters.

    Example:
        The leading eigenvector of a matrix, as the maximum of the Rayleigh quotient on the sphere.

        >>> from fgo_geo import ScaledSphere
        >>> a = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> x = geoopt.ManifoldParameter(torch.ones(3) / 3**0.5, manifold=ScaledSphere())
        >>> optimizer = RiemannianFGSGD([x], lr=0.1, maximize=True)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (x @ a @ x).backward()
        ...     optimizer.step()
        >>> x.detach().abs().round(decimals=4)
        tensor([0., 0., 1.])
    """

    rule = staticmethod(momentum_sgd)  # a subclass with another rule is another optimiser, see fgo_geo.paths.rules

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        stabilize: int | None = None,
        *,
        step_size: StepSize = "theorem",
        angle: float = 1.0,
        norm: Norm = "batch",
        rho: float = 1.0,
        curvature: float | Literal["manifold"] | None = None,
        radius_invariant: bool = False,
        update: Update = "retraction",
        adapt_euclidean: bool = False,
        check_finite: bool | None = None,
        master_weights: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        defaults |= {"foreach": foreach, "fused": fused}
        defaults |= {"stabilize": stabilize, "step": 0, "longest_step": 0.0, "check_finite": check_finite}
        defaults |= {"step_size": step_size, "angle": angle, "norm": norm, "rho": rho, "curvature": curvature}
        defaults |= {"radius_invariant": radius_invariant, "update": update, "adapt_euclidean": adapt_euclidean}
        defaults |= {"master_weights": master_weights, "differentiable": False}  # torch's load_state_dict adds the last
        self._held = Held(self)
        # Geoopt's constructor would drop the options that it does not know; its base class takes them all.
        OptimMixin.__init__(self, parameters_given(params, type(self).__name__), defaults, stabilize=stabilize)
        self._begin()

    def _begin(self) -> None:
        """Discard everything that is kept from step to step."""
        self._stepper = Stepper(type(self).__name__, self._held.name_of, self.state)
        self._masters = Masters(self.state)
        self._options: dict[int, tuple[list[Any], StepOptions]] = {}  # of every group's latest step

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stabilize = self.defaults["stabilize"]
        for group in self.param_groups:
            fill_in(self.defaults, group)
            group.update(check_options(group, type(self).__name__))
        self._held = self.__dict__.get("_held", Held(self))  # loading a state dict comes here too
        self._held.renew()
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        self._stepper.forget()
        kept = ("defaults", "state", "param_groups")
        return {name: value for name, value in super().__getstate__().items() if name in kept}

    def state_dict(self) -> dict[str, Any]:
        """Hyper-parameters and state. Continuing the run and resuming from this dictionary give identical bits."""
        self._stepper.forget()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. The state of half-precision weights keeps its own precision.

        Raises:
            ValueError: If a parameter does not lie on its manifold: load the weights first.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # weights that were loaded in place, by what knows no manifold
            self._held.check(group)
        self._masters.load(self.param_groups, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, after checking its options and that its points lie on their manifolds.

        Args:
            param_group: The parameters under ``"params"``, and options that differ from the defaults.

        Raises:
            TypeError: If the group is not a dict, or holds a module in place of parameters.
            ValueError: If an option is out of range, or a parameter does not lie on its manifold.
        """
        if not isinstance(cast(object, param_group), dict):
            raise TypeError(
                f"{type(self).__name__}: add_param_group takes a dict, e.g. {{'params': layer.named_parameters()}}, "
                f"got {described(param_group)}"
            )
        if isinstance(param_group.get("params"), nn.Module):
            parameters_given(param_group["params"], type(self).__name__)
        stabilize = param_group.get("stabilize", self._stabilize)
        words = check_options({**self.defaults, "stabilize": stabilize, **param_group}, type(self).__name__)
        super().add_param_group({**param_group, **words})
        try:
            self._held.check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._held.renew()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @between_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If an option that you changed since the last step is out of range. Nothing has changed then.
            RuntimeError: If a gradient is sparse, or a parameter has been replaced, for example by
                :func:`~fgo_geo.constrain`, or has lost its manifold. Nothing has changed then.
            FloatingPointError: If a gradient on a manifold is not finite and ``check_finite`` applies. Nothing has
                changed then.

        After any other exception, from a custom manifold or by Ctrl-C, every parameter has its value from before the
        step or from after it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._held.counts != [len(group["params"]) for group in self.param_groups]:
            self._held.renew()
        self._stepper.meet(self.param_groups)
        try:
            requests = [self._request(*numbered) for numbered in enumerate(self.param_groups)]
        except Exception as error:
            self._stepper.agree(error)
            raise
        self._stepper.step(requests)
        if self._masters.versions:
            self._masters.written_back(requests)
        for group in self.param_groups:
            if group["stabilize"] is not None:
                group["step"] += 1
                if group["step"] % group["stabilize"] == 0:
                    self.stabilize_group(group)
        return loss

    def step_scales(self) -> dict[Tensor, Tensor]:
        """The divisors ``τ`` of the latest step.

        Returns:
            A mapping from every parameter on a manifold that had a gradient (with ``adapt_euclidean``, also plain ones)
            to a tensor with one ``τ`` per group, on the parameter's device. You can also index it by name,
            ``step_scales()["fc.weight"]``, and printing it shows the names. It is empty before the first step. For
            sharded parameters, all processes must call this.
        """
        return StepScales(self._stepper.step_scales(self.param_groups), self)

    def skipped_groups(self) -> int:
        """How many steps of groups were skipped since the optimiser was built (synchronises).

        On many processes the number is per process. One process counts each group of a sharded weight, so the sum over
        the processes equals the number on a single process. Replicas count every group on each process.
        """
        return self._stepper.left_out()

    def shortened_gradients(self) -> int:
        """How many gradients ``norm="running"`` has shortened, counted as by :meth:`skipped_groups` (synchronises)."""
        return self._stepper.shortened()

    @torch.no_grad()
    def stabilize_group(self, group: dict[str, Any]) -> None:
        """Project the points of a parameter group onto their manifolds, and their momentum onto the tangent spaces.

        Args:
            group: One of ``optimizer.param_groups``.
        """
        for param in group["params"]:
            manifold = manifold_of(param)
            if manifold is not None:
                point = self._masters.project(param, manifold, keeps=group["master_weights"])
                self._stepper.project_momentum(param, point, manifold)

    def _options_of(self, number: int, group: dict[str, Any]) -> StepOptions:
        """The hyper-parameters of a group, checked and built again if they differ from those of its latest step."""
        known, values = self._options.pop(number, None), [group[name] for name in OPTIONS]
        is_number = not isinstance(group["lr"], Tensor)  # comparing tensors would wait for the device
        if known is None or not is_number or known[0] != values:
            group.update(check_options(group, type(self).__name__, number))
            known = [group[name] for name in OPTIONS], step_options(group, self.rule)
        if is_number:
            self._options[number] = known
        return known[1]

    def _request(self, number: int, group: dict[str, Any]) -> StepRequest:
        """What a parameter group passes to a step: options, and the weights with gradients and their momentum."""
        options = self._options_of(number, group)
        weights: list[Weight] = []
        plain: list[tuple[Tensor, Tensor]] = []
        for param, manifold, grad in self._stepper.collect(group["params"], self._held.manifolds):
            point = param
            if manifold is None:
                if not group["adapt_euclidean"]:
                    plain.append((param, grad))
                    continue
                manifold = self._default_manifold
            elif param.dtype in HALF and group["master_weights"]:
                point, grad = self._masters.of(param, manifold), grad.float()
            buffer = self._stepper.momentum_of(param, point) if options.keeps_buffer else None
            is_first = buffer is None and options.keeps_buffer
            weights.append(Weight(point, param, manifold, grad, buffer, is_first, name_of=self._held.name_of))
        return StepRequest(options, weights, group["check_finite"], group["norm"] == "running", plain)


setattr(RiemannianFGSGD, STEPS_SHARDS, True)
