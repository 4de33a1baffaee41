r"""Any torch optimiser on the manifolds of its parameters.

:func:`on_manifolds` attaches to an optimiser in place. In a step, the optimiser moves its parameters by its own rule.
The displacement of a weight on a manifold then takes the place of the negative gradient times the learning rate::

    d = w_new - w                     what the optimiser proposes
    g = P_w(-d / lr)                  its tangent part, per unit of learning rate
    w <- retract_w(-(lr / τ) g)       τ per group: from R = ‖g_G‖, one, or R / (angle ‖w_G‖)

This is FG-SGD without momentum and with another gradient, so every execution path supports it; the optimiser keeps its
own moments. With ``step_size="theorem"`` no group moves farther than ``(√2 - 1) lr`` for any proposal of the optimiser.

Adaptive optimisers propose entries near one for every gradient. A group of ``n`` entries then has ``R`` near ``√n``,
and the theorem's step is shorter than the optimiser's own by a factor of about ``n``: use a larger learning rate, or
``"angle"``, whose unit is the same for every optimiser.

The normal part of a displacement has no effect. Weight decay therefore has no effect on manifolds of fixed norm, where
it is normal to the manifold. The moments stay in the ambient space and are not transported. The cost in memory is one
copy of the constrained weights.
"""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import geoopt
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fgo_geo.linalg import is_sharded, local_part, reads_for_free
from fgo_geo.manifolds import REPLACED, lost_manifold, replaced_error
from fgo_geo.optim.base import Stepper, between_graphs, manifold_of
from fgo_geo.optim.finite import gradient_refusal
from fgo_geo.optim.points import StepScales, check_point, name_in
from fgo_geo.optim.requests import StepRequest
from fgo_geo.optim.step_size import longest_step
from fgo_geo.paths.protocol import StepOptions, StepSize, Update, Weight
from fgo_geo.weights.words import small

__all__ = ["OnManifolds", "handle_of", "on_manifolds"]

_foreach: Any = types.SimpleNamespace(  # torch's multi-tensor functions, which have no public names
    copy_=torch._foreach_copy_,  # pyright: ignore
    sub_=torch._foreach_sub_,  # pyright: ignore
    mul_=torch._foreach_mul_,  # pyright: ignore
)
_HANDLE = "_fgo_geo_on_manifolds"  # where an optimiser that is attached keeps its handle


def on_manifolds(
    optimizer: Optimizer,
    step_size: StepSize = "theorem",
    angle: float | None = None,
    *,
    rho: float = 1.0,
    curvature: float | str | None = None,
    radius_invariant: bool = False,
    update: Update = "retraction",
    check_finite: bool | None = None,
) -> OnManifolds:
    """Keep the parameters of an optimiser on their manifolds, with a separate step size for every group.

    Args:
        optimizer: Any torch optimiser that takes one step per call of ``step``. The function changes it in place. Its
            class, state dict, schedulers and closures stay the same.
        step_size: ``"theorem"`` divides the step of every group by its ``τ``; ``"constant"`` keeps the optimiser's own
            step length; ``"angle"`` turns every group by ``angle`` radians per unit of learning rate.
        angle: The angle, for ``step_size="angle"``; one if left out.
        rho: Bound ``ρ`` on the geodesic distance to the minimum.
        curvature: Bound ``c`` on the sectional curvature; None for eq. 7, ``"manifold"`` for the manifolds' own.
        radius_invariant: Measure ``R`` on the manifold of radius one, see :class:`~fgo_geo.RiemannianFGSGD`.
        update: ``"retraction"`` or ``"exponential"`` (map).
        check_finite: Raise an error if a displacement is not finite, before any weight changes. None checks only where
            reading the answer costs no time: on the CPU. Elsewhere, such a group does not move, and ``skipped_groups``
            counts it.

    Returns:
        A handle. ``handle.remove()`` restores the optimiser. Until then the optimiser has the handle's
        ``step_scales()``, so that :func:`fgo_geo.report` can read them. A deep copy of the optimiser or of the handle
        is attached, too. Torch does not pickle attributes of an optimiser: pickle the handle, which includes the
        optimiser.

    Raises:
        TypeError: If the optimiser evaluates the model inside its step (``torch.optim.LBFGS``), or already handles
            manifolds itself.
        ValueError: If no parameter has a manifold, one is off its manifold, an option is out of range, or the optimiser
            is already attached.

    Example:
        >>> import fgo_geo
        >>> w = geoopt.ManifoldParameter(fgo_geo.Stiefel().random(6, 3))
        >>> optimizer = torch.optim.AdamW([w], lr=0.1)
        >>> handle = on_manifolds(optimizer)
        >>> w.grad = torch.ones(6, 3)
        >>> optimizer.step()
        >>> bool(w.manifold.violation(w.detach()) < 1e-6)
        True
    """
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "on_manifolds: LBFGS evaluates the model inside its step, off the manifolds; use "
            "geoopt.optim.RiemannianLineSearch, or an optimiser that takes one step per gradient"
        )
    if isinstance(optimizer, geoopt.optim.mixin.OptimMixin):
        raise TypeError(
            f"on_manifolds: {type(optimizer).__name__} knows manifolds already; use it unchanged, or pass "
            "on_manifolds a torch optimiser"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"on_manifolds: expected a torch optimiser, got {type(optimizer).__name__}; build one, e.g. "
            "torch.optim.AdamW(model.parameters()), after constrain(model)"
        )
    if handle_of(optimizer) is not None:
        raise ValueError("on_manifolds: the optimiser is attached already; call remove() of that handle first")
    step_size, update, curvature = small(step_size), small(update), small(curvature)
    if step_size not in ("theorem", "constant", "angle"):
        raise ValueError(f"on_manifolds: step_size must be 'theorem', 'constant' or 'angle', got {step_size!r}")
    if update not in get_args(Update):
        raise ValueError(f"on_manifolds: update must be one of {get_args(Update)}, got {update!r}")
    if angle is not None and (step_size != "angle" or not 0 <= angle < torch.inf):
        raise ValueError(
            f"on_manifolds: angle is a finite number of at least 0 for step_size='angle', got {angle!r} with "
            f"step_size={step_size!r}"
        )
    options = StepOptions(
        lr=1.0,
        step_size=step_size,
        angle=1.0 if angle is None else angle,
        rho=rho,
        curvature=1.0 if curvature is None else None if curvature == "manifold" else float(curvature),
        radius_invariant=radius_invariant,
        update=update,
    )
    return OnManifolds(optimizer, options, check_finite)


def handle_of(optimizer: Optimizer) -> OnManifolds | None:
    """The handle of an optimiser that is on manifolds by :func:`on_manifolds`; None for another one."""
    return vars(optimizer).get(_HANDLE)


class OnManifolds:
    """The handle that :func:`on_manifolds` returns: it detaches from the optimiser, and reports on the latest step.

    Args:
        optimizer: The optimiser.
        options: Hyper-parameters of a step; the learning rate is the optimiser's.
        check_finite: As in :func:`on_manifolds`.

    Attributes:
        optimizer: The optimiser.
    """

    def __init__(self, optimizer: Optimizer, options: StepOptions, check_finite: bool | None) -> None:
        self._begin(optimizer, options, check_finite)
        for group in optimizer.param_groups:
            self._check(group)
        if not self._checked:
            raise ValueError(
                "on_manifolds: no parameter of the optimiser has a manifold; call fgo_geo.constrain(model) first, and "
                "build the optimiser from what model.parameters() gives then. Torch's sharding drops manifolds: shard "
                "with fgo_geo.distributed.fully_shard, or call plan_of(model).attach(model) afterwards"
            )
        self._attach(optimizer.step)

    def _begin(self, optimizer: Optimizer, options: StepOptions, check_finite: bool | None) -> None:
        self.optimizer = optimizer
        self._options = options
        self._check_finite = check_finite
        self._points: dict[Tensor, Tensor] = {}
        self._checked: dict[Tensor, geoopt.Manifold] = {}
        unchanged = (
            "no weight on a manifold was changed, other parameters and the optimiser's state were, so go back to a "
            "checkpoint"
        )
        self._stepper = Stepper("on_manifolds", self._name_of, {}, unchanged)
        self._is_active = False
        self._is_agreed = False  # whether all processes know of the error that ends this step
        self._waiting: list[Callable[[], None]] = []

    def _attach(self, inner: Callable[..., Any]) -> None:
        @functools.wraps(inner)
        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self._step(inner, closure) if self._is_active else _call(inner, closure)

        self.optimizer.step = types.MethodType(between_graphs(step), self.optimizer)  # schedulers expect a method
        # Not a method of the class: copy.deepcopy asks the object for it.
        own = {_HANDLE: self, "__deepcopy__": self._copy_of_optimizer, "step_scales": self.step_scales}
        vars(self.optimizer).update(own)
        self._is_active = True

    def _copy_of_optimizer(self, memo: dict[int, Any]) -> Optimizer:
        """A deep copy of the optimiser, on the manifolds of its parameters, too."""
        reduced: Any = self.optimizer.__reduce_ex__(4)
        make, arguments, state, *_ = reduced
        optimizer = memo[id(self.optimizer)] = make(*arguments)
        optimizer.__setstate__(copy.deepcopy(state, memo))
        OnManifolds.__new__(OnManifolds).__setstate__((optimizer, self._options, self._check_finite, True))
        return optimizer

    def __deepcopy__(self, memo: dict[int, Any]) -> OnManifolds:
        optimizer = copy.deepcopy(self.optimizer, memo)
        handle = handle_of(optimizer)
        if handle is None:  # this one has been removed
            handle = OnManifolds.__new__(OnManifolds)
            handle.__setstate__((optimizer, self._options, self._check_finite, False))
        return handle

    def __getstate__(self) -> tuple[Any, ...]:
        return self.optimizer, self._options, self._check_finite, self._is_active

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        optimizer, options, check_finite, is_active = state
        self._begin(optimizer, options, check_finite)
        if is_active and handle_of(optimizer) is None:
            self._attach(optimizer.step)

    def remove(self) -> None:
        """Restore the optimiser. Its parameters keep their values."""
        self._is_active = False
        self._points.clear()
        if handle_of(self.optimizer) is self:
            for name in (_HANDLE, "__deepcopy__", "step_scales"):
                del vars(self.optimizer)[name]

    def after_step(self, call: Callable[[], None]) -> None:
        """Register a function to be called once when the current step is complete; not if the step is refused.

        Args:
            call: The function.
        """
        self._waiting.append(call)

    @property
    def step_size(self) -> StepSize:
        """How the steps of groups are scaled."""
        return self._options.step_size

    def step_scales(self) -> dict[Tensor, Tensor]:
        """The divisors ``τ`` of the latest step: for every parameter on a manifold, one per group.

        With sharded parameters, all processes have to call this.
        """
        return StepScales(self._stepper.step_scales(self.optimizer.param_groups), self.optimizer)

    def skipped_groups(self) -> int:
        """How many group steps were skipped because the displacement was not finite (synchronises).

        On many processes the number is per process. One process counts each group of a sharded weight.
        """
        return self._stepper.left_out()

    def __repr__(self) -> str:
        name, o = type(self.optimizer).__name__, self._options
        return f"OnManifolds({name}, step_size={o.step_size!r}, {len(self._checked)} parameters on manifolds)"

    # -- the step --------------------------------------------------------------------------------------------

    def _step(self, inner: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
        """Let the optimiser move, and move along the manifolds instead.

        After an error the weights on manifolds have their former values, unless the retraction of a manifold from
        outside the package raised after others had moved. The method refuses gradients that are not finite before the
        optimiser moves, so in that case nothing else has changed either.
        """
        self._waiting.clear()
        self._stepper.meet(self.optimizer.param_groups)
        self._is_agreed = False
        problem: Exception | None = None
        constrained: list[list[Any]] = []
        params: list[Any] = []
        points: list[Tensor] = []
        try:
            constrained = [[p for p in group["params"] if manifold_of(p) is not None] for group in self._groups()]
            params = [p for own in constrained for p in own]
            for param in params:
                point = self._points.get(param)
                if point is None or _form(point) != _form(param):
                    self._points[param] = torch.empty_like(param.detach())
            points = [self._points[p] for p in params]
            with torch.no_grad():
                _foreach.copy_(_here(points), _here(params))
            problem = self._problem_of_gradients(params) if closure is None else None
        except Exception as error:
            problem = error
        self._stepper.agree(problem)
        try:
            try:
                loss = _call(inner, None if closure is None else self._evaluated_once(closure, params))
                with torch.no_grad():
                    requests = [self._request(*own) for own in zip(self._groups(), constrained, strict=True)]
            except Exception as error:
                if not self._is_agreed:
                    self._stepper.agree(error)
                raise
            with torch.no_grad():
                self._stepper.step([request for request in requests if request is not None])
        except BaseException:
            with torch.no_grad():
                _foreach.copy_(_here(params), _here(points))
            raise
        for call in self._waiting:
            call()
        return loss

    def _problem_of_gradients(self, params: Sequence[Tensor]) -> Exception | None:
        """An error if the gradient of a weight on a manifold is not finite on this process, where that is checked."""
        for param in params:
            if param.grad is None:
                continue
            (grad,) = _here([param.grad.detach()])
            if not (self._check_finite or (self._check_finite is None and reads_for_free(grad))):
                continue
            if not math.isfinite(float(grad.sum())) and not bool(torch.isfinite(grad).all()):
                unchanged = "no parameter was changed"
                return gradient_refusal("on_manifolds", self._name_of(param), manifold_of(param), unchanged)
        return None

    def _groups(self) -> list[dict[str, Any]]:
        groups = self.optimizer.param_groups
        for group in groups:
            self._check(group)
        return groups

    def _check(self, group: dict[str, Any]) -> None:
        """Raise if a parameter cannot be stepped; points are checked once."""
        for param in group["params"]:
            if getattr(param, REPLACED, False):
                raise replaced_error(f"on_manifolds: {self._name_of(param)}")
            manifold = manifold_of(param)
            if manifold is None and param in self._checked:
                raise lost_manifold(self._checked[param], f"on_manifolds: {self._name_of(param)}")
            if manifold is None and not self._points:  # before the first step
                check_point(param, f"on_manifolds: {self._name_of(param)}", self._options.step_size)
            if manifold is None or param in self._checked:
                continue
            if "lr" not in group:
                raise ValueError(
                    f"on_manifolds: a step is measured per unit of learning rate, and {type(self.optimizer).__name__} "
                    "has no lr in its param_groups"
                )
            check_point(param, f"on_manifolds: {self._name_of(param)}", self._options.step_size)
            self._checked[param] = manifold

    def _evaluated_once(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> Callable[[], Any]:
        """The closure; it raises if the optimiser evaluates it while parameters are off their manifolds.

        An error of one process is raised on all, and is not to be agreed on again.
        """

        def evaluate() -> Any:
            loss = None
            try:
                if any(not torch.equal(p.detach(), self._points[p]) for p in params):
                    raise RuntimeError(
                        f"on_manifolds: {type(self.optimizer).__name__} evaluates the model inside its step, off the "
                        "manifolds; no parameter was changed. Use an optimiser that takes one step per gradient"
                    )
                loss = closure()
                problem = self._problem_of_gradients(params)
            except Exception as error:
                problem = error
            try:
                self._stepper.agree(problem)
            except Exception:
                self._is_agreed = True
                raise
            return loss

        return evaluate

    def _request(self, group: dict[str, Any], params: Sequence[Tensor]) -> StepRequest | None:
        """The displacements of a group as gradients; they reuse the memory of the weights that the optimiser moved."""
        moved = [p for p in params if p.grad is not None and p.numel()]
        points = [self._points[p] for p in moved]
        lr = group["lr"]
        lr = lr if isinstance(lr, Tensor) and not reads_for_free(lr) else float(lr)
        if not moved or lr == 0:
            return None
        here = _here(moved)
        _foreach.sub_(here, _here(points))
        _foreach.mul_(here, -1 / lr)
        options = replace(self._options, lr=lr)
        options = replace(options, longest_step=longest_step(options))
        weights = [Weight(self._points[p], p, manifold_of(p), p.detach(), name_of=self._name_of) for p in moved]
        return StepRequest(options, weights, self._check_finite)

    def _name_of(self, param: Tensor) -> str:
        return name_in(self.optimizer, param)


def _form(tensor: Tensor) -> tuple[object, ...]:
    """The properties that a copy of a tensor has to share with it."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _here(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of tensors that this process holds."""
    return [local_part(tensor) if is_sharded(tensor) else tensor for tensor in tensors]


def _call(inner: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
    return inner() if closure is None else inner(closure)
