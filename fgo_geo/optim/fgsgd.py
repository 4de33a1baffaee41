r"""FG-SGD: stochastic gradient descent on products of manifolds, with the step size of the convergence theorem.

:class:`RiemannianFGSGD` validates options, keeps state, and collects weights with their gradients and momentum. The
step is in :mod:`fgo_geo.optim.base`, its formulas in :mod:`fgo_geo.paths.reference` and
:mod:`fgo_geo.optim.step_size`. Parameters without a constraint take the step of :class:`torch.optim.SGD`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import geoopt
import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fgo_geo.linalg import reads_for_free
from fgo_geo.manifolds import REPLACED
from fgo_geo.optim.base import SPIKE, Stepper, StepRequest, between_graphs, manifold_of
from fgo_geo.optim.options import OPTIONS, Norm, check_options
from fgo_geo.optim.points import HALF, Masters, StepScales, check_point, name_in, parameters_given
from fgo_geo.optim.step_size import longest_step
from fgo_geo.paths.protocol import StepOptions, StepSize, Update, Weight

__all__ = ["RiemannianFGSGD"]

_Group: TypeAlias = dict[str, Any]
_NAME = "RiemannianFGSGD"


class RiemannianFGSGD(geoopt.optim.RiemannianSGD):
    r"""Riemannian SGD whose step size follows from the convergence theorem of FG-SGD.

    Every group ``G`` moves by ``-(lr / τ) grad`` with ``τ = ( max{1, R² (2 + R)²} )^{1/2}``, ``R`` the norm of its
    Riemannian gradient ([Ozay2019]_, eq. 7). A parameter on a manifold is one group. With the defaults, steps on
    manifolds are never longer than ``(√2 - 1) lr`` (with momentum ``μ``: ``(√2 - 1) lr / (1 - μ)``), whatever the
    gradient.

    Works for every manifold of Geoopt. Plain parameters and those on :class:`geoopt.Euclidean` take the step of
    :class:`torch.optim.SGD`, bit for bit. ``p.grad`` is read, never written. Weight decay acts where it means
    something: on plain parameters and on Geoopt's own manifolds; on spheres, oblique and Stiefel manifolds it is
    radial and projects to zero. Momentum on a manifold takes the type and the device of a weight that was converted or
    moved between steps (``model.double()``), as loading a ``state_dict`` would.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate, a number or a tensor with one element.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: Weight decay (L2 penalty).
        nesterov: Nesterov momentum; needs momentum and zero dampening.
        stabilize: Project points and momentum every so many steps (None: never; the steps themselves correct
            rounding drift).
        step_size: ``"theorem"`` divides by ``τ``; ``"constant"`` does not; ``"angle"`` turns every group by ``angle``
            radians per unit of learning rate (Euclidean components take a constant step).
        angle: The angle, for ``step_size="angle"``.
        norm: Which norm ``τ`` is computed from: ``"batch"`` takes that of this gradient, as [Ozay2019]_ does;
            ``"running"`` a mean over earlier steps, so that on average steps point along the mean gradient. There,
            gradients that would break the bound on a step ten times are shortened to that, see
            :meth:`shortened_gradients`.
        rho: Bound ``ρ`` on the geodesic distance to the minimum.
        curvature: Bound ``c`` on the sectional curvature; None for eq. 7 (``c <= 1``), ``"manifold"`` for our
            manifolds' own ``1/r²`` (zero on Euclidean components, one on Geoopt's manifolds).
        radius_invariant: Measure ``R`` on the manifold of radius one. Training at radius ``r`` is then the same as
            training at radius one with the weight multiplied by ``r`` in the forward pass; eq. 7 as printed measures
            ``R`` where the weight lives.
        update: ``"retraction"`` or ``"exponential"`` (map).
        adapt_euclidean: Divide by ``τ`` on plain parameters too.
        check_finite: Raise on a gradient on a manifold that is not finite, before anything has changed. None checks
            where reading the answer is free: on the CPU. Elsewhere such a group takes no gradient in this step, stays
            on its manifold, and is counted in :meth:`skipped_groups`. Plain parameters are not checked, as in
            :class:`torch.optim.SGD`, unless they are adapted.
        master_weights: Keep a copy of half-precision weights on manifolds in single precision, in the state, and step
            that: a step of less than a rounding unit of the weight is not lost. Without it, steps are computed in
            single precision and rounded.
        maximize: Ascend instead of descend.
        foreach: For plain parameters, as in :class:`torch.optim.SGD`.
        fused: For plain parameters, as in :class:`torch.optim.SGD`.

    Raises:
        TypeError: If ``params`` is a module or another thing that holds no parameters, or a number is none.
        ValueError: If an option is out of range, a parameter does not lie on its manifold, or there are none.

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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "stabilize": stabilize,
            "step": 0,
            "longest_step": 0.0,
            "step_size": step_size,
            "angle": angle,
            "norm": norm,
            "rho": rho,
            "curvature": curvature,
            "radius_invariant": radius_invariant,
            "update": update,
            "adapt_euclidean": adapt_euclidean,
            "check_finite": check_finite,
            "master_weights": master_weights,
            "differentiable": False,  # load_state_dict of every torch optimiser adds it
        }
        # Geoopt's constructor would drop the options that it does not know; its base class takes them all.
        OptimMixin.__init__(self, parameters_given(params, _NAME), defaults, stabilize=stabilize)
        self._begin()

    def _begin(self) -> None:
        """Forget what was kept from step to step."""
        self._stepper = Stepper(_NAME, self._name_of, self.state)
        self._masters = Masters(self.state)
        self._checked: dict[int, list[Any]] = {}  # options that were checked already, by parameter group

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stabilize = self.defaults["stabilize"]
        for option, value in _LATER_OPTIONS.items():
            self.defaults.setdefault(option, value)
        for group in self.param_groups:  # a checkpoint of torch.optim.SGD or of Geoopt knows fewer options
            group.setdefault("longest_step", math.inf)  # its buffers may be of any length
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            group.update(check_options(group, _NAME))
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("defaults", "state", "param_groups")
        return {name: value for name, value in super().__getstate__().items() if name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; what belongs to half-precision weights keeps its own precision."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if param.dtype in HALF and manifold_of(param) is not None:
                for name, value in state_dict["state"].get(number, {}).items():
                    self.state[param][name] = value.to(param.device, copy=True) if isinstance(value, Tensor) else value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, after checking its options and that its points lie on their manifolds.

        Args:
            param_group: The parameters under ``"params"``, and options that differ from the defaults.

        Raises:
            ValueError: If an option is out of range, or a parameter does not lie on its manifold.
        """
        stabilize = param_group.get("stabilize", self._stabilize)
        words = check_options({**self.defaults, "stabilize": stabilize, **param_group}, _NAME)
        super().add_param_group({**param_group, **words})
        added = self.param_groups[-1]
        try:
            for param in added["params"]:
                check_point(param, f"{_NAME}: {self._name_of(param)}", added["step_size"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

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
            ValueError: If an option that was changed since the last step is out of range. Nothing has changed then.
            RuntimeError: If a gradient is sparse, or :func:`~fgo_geo.constrain` or :func:`~fgo_geo.unconstrain` has
                replaced a parameter since. Nothing has changed then.
            FloatingPointError: If a gradient on a manifold is not finite and ``check_finite`` applies. Nothing has
                changed then.

        Anything else that is raised on the way, by a manifold of your own or by Ctrl-C, leaves every parameter as it
        was before its step or after it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            values = [group[name] for name in OPTIONS]
            if isinstance(group["lr"], Tensor) or self._checked.get(number) != values:
                group.update(check_options(group, _NAME, _SINCE.format(number)))
                values = [group[name] for name in OPTIONS]
                self._checked[number] = values
        self._stepper.step([self._request(group) for group in self.param_groups])
        for group in self.param_groups:
            for param in group["params"] if group["master_weights"] else ():
                if param.dtype in HALF:
                    self._masters.written(param)
            if group["stabilize"] is not None:
                group["step"] += 1
                if group["step"] % group["stabilize"] == 0:
                    self.stabilize_group(group)
        return loss

    def step_scales(self) -> dict[Tensor, Tensor]:
        """The divisors ``τ`` of the latest step.

        Returns:
            For every parameter on a manifold that had a gradient (with ``adapt_euclidean``, for plain ones too), in
            the order of the parameters, a tensor with one ``τ`` per group, on the parameter's device. Reading it is
            the caller's synchronisation, not the step's. Empty before the first step.
        """
        scales = self._stepper.step_scales()
        params = [param for group in self.param_groups for param in group["params"] if param in scales]
        return StepScales({param: scales[param] for param in params}, self)

    def skipped_groups(self) -> int:
        """How many group steps were left out because the gradient was not finite (synchronises).

        Counted since the optimiser was built, or was given a ``state_dict``.
        """
        return self._stepper.left_out()

    def shortened_gradients(self) -> int:
        """How many gradients of groups were shortened under ``norm="running"`` (synchronises).

        Counted since the optimiser was built, or was given a ``state_dict``.
        """
        return self._stepper.shortened()

    @torch.no_grad()
    def stabilize_group(self, group: dict[str, Any]) -> None:
        """Project the points of a parameter group onto their manifolds, and their momentum onto the tangent spaces.

        Args:
            group: One of ``optimizer.param_groups``.
        """
        for param in group["params"]:
            manifold = manifold_of(param)
            if manifold is None:
                continue
            point = self.state.get(param, {}).get("master", param)
            point.copy_(manifold.projx(point))
            if point is not param:
                param.copy_(point)
                self._masters.written(param)
            buffer = self._momentum_of(param, point)
            if buffer is not None:
                buffer.copy_(manifold.proju(point, buffer))

    # -- what a step works on --------------------------------------------------------------------------------

    def _name_of(self, param: Tensor) -> str:
        return name_in(self, param)

    def _request(self, group: _Group) -> StepRequest:
        """Hyper-parameters and weights of a parameter group, after checking what can be refused at once."""
        lr, curvature = group["lr"], group["curvature"]
        options = StepOptions(
            lr=lr if isinstance(lr, Tensor) and not reads_for_free(lr) else float(lr),
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            step_size=group["step_size"],
            rho=group["rho"],
            curvature=1.0 if curvature is None else None if curvature == "manifold" else curvature,
            angle=group["angle"],
            radius_invariant=group["radius_invariant"],
            update=group["update"],
            longest_step=_longest_step(group),
            foreach=group["foreach"],
            fused=group["fused"],
        )
        weights: list[Weight] = []
        for param in group["params"]:
            if getattr(param, REPLACED, False):
                raise RuntimeError(
                    f"{_NAME}: {self._name_of(param)} is no parameter of its model any more: constrain or unconstrain "
                    "has put another in its place; no parameter was changed. Build the optimiser after that, from what "
                    "model.named_parameters() gives now"
                )
            grad = param.grad
            if grad is None or param.numel() == 0:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    f"{_NAME}: the gradient of {self._name_of(param)} is sparse, expected a dense one; build the layer "
                    "with sparse=False or use geoopt's SparseRiemannianSGD for it"
                )
            manifold = manifold_of(param)
            point = param
            if manifold is None and group["adapt_euclidean"]:
                manifold = self._default_manifold
            elif manifold is not None and param.dtype in HALF and group["master_weights"]:
                point, grad = self._masters.of(param, manifold), grad.float()
            buffer = self._momentum_of(param, point) if group["momentum"] != 0 else None
            is_first = buffer is None and group["momentum"] != 0
            weights.append(Weight(point, param, manifold, grad, buffer, is_first))
        return StepRequest(options, weights, group["check_finite"], group["norm"] == "running")

    def _momentum_of(self, param: Tensor, point: Tensor) -> Tensor | None:
        """The momentum of a parameter, in the type, on the device and with the strides of what is moved.

        It has others when the weight was converted or moved after a step, by ``model.double()`` or ``model.to(...)``.
        """
        state = self.state.get(param)
        buffer = None if state is None else state.get("momentum_buffer")
        if buffer is None or state is None:
            return None
        if buffer.dtype != point.dtype or buffer.device != point.device or buffer.stride() != point.stride():
            buffer = state["momentum_buffer"] = torch.empty_like(point.detach()).copy_(buffer)
        return buffer


_SINCE = "; no parameter was changed. Look at what has set it in param_groups[{}] since the last step"
_LATER_OPTIONS = {"angle": 1.0, "norm": "batch", "master_weights": True}  # which pickles of version 0.1.0 lack


def _longest_step(group: _Group) -> float:
    """Bound on the length of a step per unit of learning rate.

    With momentum it never falls: what a larger momentum has put into the buffers is still there after it has dropped.
    """
    known = {name: group[name] for name in ("momentum", "dampening", "nesterov", "step_size", "rho")}
    longest = longest_step(StepOptions(lr=0.0, **known), SPIKE if group["norm"] == "running" else 1.0)
    if group["momentum"] != 0:
        longest = group["longest_step"] = max(longest, group["longest_step"])
    return longest
