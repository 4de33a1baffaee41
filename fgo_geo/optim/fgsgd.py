r"""FG-SGD: stochastic gradient descent on products of manifolds, with the step size of the convergence theorem.

One step is the composition of small pure functions on whole tensors:

1. :meth:`~geoopt.Manifold.egrad2rgrad` projects the gradient onto the tangent space;
2. :func:`~fgo_geo.optim.theorem_step_scale` turns the norm ``R`` of every group into its ``τ``;
3. :func:`fgsgd_update` adds momentum and moves along a retraction.

Some weights take the same step otherwise, to rounding: kernels, spheres and oblique manifolds that a fused path takes
(:mod:`fgo_geo.paths.router`), and large Stiefel matrices, in which the three share products
(:mod:`fgo_geo.paths.shared_products`).

:class:`RiemannianFGSGD` is what surrounds them: validation and state. What one batched call works on is a
:class:`~fgo_geo.paths.jobs.Job`. Parameters without a constraint never get there: they take the step of
:class:`torch.optim.SGD` through torch's own kernels.

Momentum is transported by projection, and lazily: the buffer is projected at the start of the next step, when the
target's tangent space is known, rather than at the end of this one. The numbers are the same; a stored buffer is
tangent at the point that its step started from. Manifolds of Geoopt that define another transport get it, at the end.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, cast, get_args, overload

import geoopt
import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from fgo_geo.linalg import Workspace, reads_for_free, small_product
from fgo_geo.manifolds import ComponentManifold, EmbeddedManifold, ProductOfGroups, Stiefel, was_replaced
from fgo_geo.optim.step_size import momentum_gain, theorem_step_bound, theorem_step_scale
from fgo_geo.paths import router as kernels
from fgo_geo.paths.jobs import FusedTasks, Job, LargeKernels, Piece, TracedTasks, join, manifold_of, pieces_of, put_back
from fgo_geo.paths.shared_products import Carried, over_components, shared_products_step, tangent_square

__all__ = ["RiemannianFGSGD", "fgsgd_update"]

StepSize = Literal["theorem", "constant"]
Update = Literal["retraction", "exponential"]

_LARGE_MATRIX = 16  # columns
_MODERATE = 2.0**60  # norm of a gradient whose square is far from overflowing, in single precision
_UNKNOWN_LR_BOUND = 100.0  # assumed bound on ‖step‖ / r when the learning rate is a tensor that cannot be read for free


_Pieces: TypeAlias = tuple[tuple[Tensor, int], ...]  # of a job: parameters and numbers of their parts
_Seal: TypeAlias = tuple[tuple[Tensor, int], ...]  # tensors, and how often they were written to
# Of a piece: parameter and number, new components (None if they are where they belong already), momentum, τ.
_Result: TypeAlias = tuple[Tensor, int, Tensor | None, Tensor | None, Tensor]
_Step = TypeVar("_Step", bound=Callable[..., Any])


def _out_of_old_graphs(step: _Step) -> _Step:
    """Before torch 2.8 torch.compile traces no parameters of a class of their own: the step runs between its graphs."""
    if torch.__version__ >= "2.8":
        return step
    return torch._disable_dynamo(step)  # pyright: ignore  torch.compiler.disable would import the compiler now


class _Options(TypedDict):
    """What a parameter group holds."""

    params: list[Tensor]
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    foreach: bool | None
    fused: bool | None
    stabilize: int | None
    step: int
    longest_step: float
    step_size: StepSize
    rho: float
    curvature: float | Literal["manifold"] | None
    radius_invariant: bool
    update: Update
    adapt_euclidean: bool
    check_finite: bool | None


def fgsgd_update(
    manifold: geoopt.Manifold,
    x: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    update: Update = "retraction",
    bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add momentum to a scaled Riemannian gradient and move ([Ozay2019]_, algorithm 1, lines 8-9).

    Args:
        manifold: Where ``x`` lives.
        x: Points.
        grad: Tangent vectors at ``x``: the Riemannian gradient divided by ``τ``.
        buffer: Momentum of the step before, or None in the first one.
        lr: Learning rate.
        momentum: Momentum factor; zero for none.
        dampening: Dampening of the momentum.
        nesterov: Take Nesterov's direction, ``grad + momentum * buffer``.
        update: Move along the retraction or the exponential map.
        bound: Bound on the length of the step relative to the radius, if one is known.

    Returns:
        The new points and the new buffer (None without momentum).

    Example:
        >>> from fgo_geo import ScaledSphere
        >>> x, grad = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0])
        >>> fgsgd_update(ScaledSphere(), x, grad, None, lr=torch.pi / 2, update="exponential")[0].round(decimals=6)
        tensor([-0.,  1.])
    """
    lazy = isinstance(manifold, EmbeddedManifold)
    direction = grad
    if momentum != 0:
        if buffer is None:
            buffer = grad
        else:
            carried = manifold.proju(x, buffer) if lazy else buffer
            buffer = torch.add((1 - dampening) * grad if dampening else grad, carried, alpha=momentum)
        direction = grad + momentum * buffer if nesterov else buffer
    if update == "retraction" and isinstance(manifold, ComponentManifold) and reads_for_free(x):
        return manifold.retract_bounded(x, direction, bound, -float(lr)), buffer
    rate = lr.reshape(()) if isinstance(lr, Tensor) else lr  # without dimensions it leaves the type alone
    step = -rate * direction
    if update == "exponential":
        if lazy or buffer is None:
            return manifold.expmap(x, step), buffer
        return manifold.expmap_transp(x, step, buffer)
    if isinstance(manifold, ComponentManifold):
        return manifold.retract_bounded(x, step, bound), buffer
    if buffer is None:
        return manifold.retr(x, step), None
    return manifold.retr_transp(x, step, buffer)


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
        lr: Learning rate, a number or a tensor with one element. Inside ``torch.compile`` take a tensor if it is to
            change: a new number can be compiled anew.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: Weight decay (L2 penalty).
        nesterov: Nesterov momentum; needs momentum and zero dampening.
        stabilize: Project points and momentum every so many steps (None: never; the steps themselves correct
            rounding drift).
        step_size: ``"theorem"`` divides by ``τ``; ``"constant"`` does not.
        rho: Bound ``ρ`` on the geodesic distance to the minimum.
        curvature: Bound ``c`` on the sectional curvature; None for eq. 7 (``c <= 1``), ``"manifold"`` for our
            manifolds' own ``1/r²`` (zero on Euclidean components, one on Geoopt's manifolds).
        radius_invariant: Measure ``R`` on the manifold of radius one. Training at radius ``r`` is then the same as
            training at radius one with the weight multiplied by ``r`` in the forward pass; eq. 7 as printed measures
            ``R`` where the weight lives.
        update: ``"retraction"`` or ``"exponential"`` (map).
        adapt_euclidean: Divide by ``τ`` on plain parameters too.
        check_finite: Raise on a gradient on a manifold that is not finite, before anything has changed. None checks
            where reading the answer is free: on the CPU, outside of ``torch.compile``. Elsewhere such a group takes
            no gradient in this step, stays on its manifold, and is counted in :meth:`skipped_groups`. True ends the
            graph inside ``torch.compile``, which refuses that with ``fullgraph=True``. Plain parameters are not
            checked, as in :class:`torch.optim.SGD`, unless they are adapted.
        maximize: Ascend instead of descend.
        foreach: For plain parameters, as in :class:`torch.optim.SGD`.
        fused: For plain parameters, as in :class:`torch.optim.SGD`.

    Raises:
        ValueError: If an option is out of range, or a parameter does not lie on its manifold.

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
        rho: float = 1.0,
        curvature: float | Literal["manifold"] | None = None,
        radius_invariant: bool = False,
        update: Update = "retraction",
        adapt_euclidean: bool = False,
        check_finite: bool | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._step_scales: dict[Tensor, dict[int, Tensor]] = {}  # by piece
        self._fused_scales: list[tuple[list[Tensor], list[int], Tensor]] = []  # by batch: parameters, counts, values
        self._skipped: dict[torch.device, Tensor] = {}
        self._fused: dict[int, FusedTasks] = {}  # by parameter group
        self._carried: dict[_Pieces, tuple[Carried, _Seal]] = {}  # by job
        self._workspace = Workspace()
        self._steps = 0  # that have come to their end, so that what one leaves is not where the next one writes
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
            "rho": rho,
            "curvature": curvature,
            "radius_invariant": radius_invariant,
            "update": update,
            "adapt_euclidean": adapt_euclidean,
            "check_finite": check_finite,
            "differentiable": False,  # load_state_dict of every torch optimiser adds it
        }
        # Geoopt's constructor would drop the options that it does not know; its base class takes them all.
        OptimMixin.__init__(self, params, defaults, stabilize=stabilize)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stabilize = self.defaults["stabilize"]
        self._step_scales = {}
        self._fused_scales = []
        self._skipped = {}
        self._fused = {}
        self._carried = {}
        self._workspace = Workspace()
        self._steps = 0
        for group in self.param_groups:  # a checkpoint of torch.optim.SGD or of Geoopt knows fewer options
            group.setdefault("longest_step", math.inf)  # its buffers may be of any length
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            _check_options(group)
            for param in group["params"]:
                _register(param)

    def state_dict(self) -> dict[str, Any]:
        """What every optimiser's is.

        To go on from here and from the checkpoint is the same, bit for bit: the products that steps carry over are in
        neither, and are taken again. So a run that is saved is rounded otherwise than one that is not.
        """
        self._carried.clear()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._carried.clear()  # for copies what state_dict() is for checkpoints
        return super().__getstate__()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, after checking its options and that its points lie on their manifolds.

        Args:
            param_group: The parameters under ``"params"``, and options that differ from the defaults.

        Raises:
            ValueError: If an option is out of range, or a parameter does not lie on its manifold.
        """
        stabilize = param_group.get("stabilize", self._stabilize)
        _check_options({**self.defaults, "stabilize": stabilize, **param_group})
        super().add_param_group(param_group)
        added = cast(_Options, self.param_groups[-1])
        _longest_step(added)  # now, since torch.compile traces numbers that change in a step as symbols
        try:
            for param in added["params"]:
                _check_point(param, lambda: self._name_of(param))  # noqa: B023  called at once
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_out_of_old_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a gradient is sparse, or :func:`~fgo_geo.constrain` or :func:`~fgo_geo.unconstrain` has
                replaced a parameter since. Nothing has changed then.
            FloatingPointError: If a gradient on a manifold is not finite and ``check_finite`` applies. Nothing has
                changed then. Or, after the step, if a weight is not finite itself.

        Anything else that is raised on the way, by a manifold of your own or by Ctrl-C, leaves every parameter as it
        was before its step or after it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = cast(list[_Options], self.param_groups)
        try:
            self._step_groups(groups)
        finally:
            if not torch.compiler.is_compiling():
                self._fused = {number: fused for number, fused in self._fused.items() if number < len(groups)}
                for fused in self._fused.values():
                    fused.release()
        for group in groups:
            if group["stabilize"] is not None:
                group["step"] += 1
                if group["step"] % group["stabilize"] == 0:
                    self.stabilize_group(cast(dict[str, Any], group))
        return loss

    def _step_groups(self, groups: Sequence[_Options]) -> None:
        if not torch.compiler.is_compiling():
            for group in groups:
                _check_rate(group["lr"])
                for param in group["params"]:
                    if was_replaced(param):
                        raise self._stale(param)
        work = [(group, *self._prepare(number, group)) for number, group in enumerate(groups)]
        norms = [[self._group_norms(group, job) for job in jobs] for group, _, _, jobs, _ in work]
        fused_norms = [[self._fused_norms(group, batch) for batch in batches] for group, _, batches, *_ in work]
        self._step_scales.clear()  # torch.compile drops assignments to an optimiser's attributes
        self._fused_scales.clear()
        carried = {
            pieces: left for pieces, (left, seal) in self._carried.items() if _is_unbroken(seal, self._seal(pieces))
        }
        self._carried.clear()
        left: dict[_Pieces, Carried] = {}
        held: list[_Result] = []
        broken: list[Tensor] = []
        for (group, _, _, jobs, _), squared_norms in zip(work, norms, strict=True):
            for job, squared in zip(jobs, squared_norms, strict=True):
                results = self._move(group, job, squared, carried, left)
                if job.is_whole:
                    self._write(results)
                else:
                    held += results
        for (group, plain, batches, _, large), fused_squared in zip(work, fused_norms, strict=True):
            self._step_plain(group, plain)
            for param in large:
                self._step_large(group, param, broken)
            for batch, measured in zip(batches, fused_squared, strict=True):
                self._step_fused(group, batch, measured, broken)
        self._write(held)
        self._carried.update({pieces: (leaves, self._seal(pieces)) for pieces, leaves in left.items()})
        self._steps += 1
        if broken:
            raise self._broken_weight(broken, "all others have taken their step")

    def step_scales(self) -> dict[Tensor, Tensor]:
        """The divisors ``τ`` of the latest step.

        Returns:
            For every parameter on a manifold that had a gradient (with ``adapt_euclidean``, for plain ones too), in
            the order of the parameters, a tensor with one ``τ`` per group, on the parameter's device. Reading it is
            the caller's synchronisation, not the step's.
        """
        scales: dict[Tensor, Tensor] = {}
        for params, counts, tau in self._fused_scales:
            for param, taus in zip(params, tau.split(counts), strict=True):
                scales[param] = taus.to(param.dtype)
        for param, by_part in self._step_scales.items():
            manifold = manifold_of(param)
            product = isinstance(manifold, ProductOfGroups)
            scales[param] = manifold.in_collection_order(by_part, scales.get(param)) if product else by_part[0]
        return {param: scales[param] for group in self.param_groups for param in group["params"] if param in scales}

    def skipped_groups(self) -> int:
        """How many group steps were left out because the gradient was not finite (synchronises).

        Counted since the optimiser was built, or was given a ``state_dict``.
        """
        return sum(int(count) for count in self._skipped.values())

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
            param.copy_(manifold.projx(param))
            self._carried.clear()
            buffer = self._momentum_like(param)
            if buffer is not None:
                buffer.copy_(manifold.proju(param, buffer))

    def _momentum_of(self, param: Tensor) -> Tensor | None:
        return self.state[param].get("momentum_buffer") if param in self.state else None

    def _momentum_like(self, param: Tensor) -> Tensor | None:
        """The momentum of a parameter in its type and on its device, as ``load_state_dict`` would bring it there.

        It is not when the weight was converted or moved after a step, by ``model.double()`` or ``model.to(device)``.
        """
        buffer = self._momentum_of(param)
        if buffer is not None and (buffer.dtype != param.dtype or buffer.device != param.device):
            buffer = self.state[param]["momentum_buffer"] = buffer.to(dtype=param.dtype, device=param.device)
        return buffer

    # -- before anything changes -----------------------------------------------------------------------------

    def _name_of(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    names = group.get("param_names")
                    name = f"{names[position]!r}, " if names else ""
                    return f"{name}param_groups[{number}]['params'][{position}] of shape {tuple(param.shape)}"
        return f"a parameter of shape {tuple(param.shape)}"

    def _prepare(
        self, number: int, group: _Options
    ) -> tuple[list[Tensor], Sequence[kernels.Batch | kernels.TracedBatch], list[Job], list[Tensor]]:
        """Split a group into plain parameters, fused batches, jobs, and weights whose jobs are made when they step.

        Make the jobs' gradients Riemannian.
        """
        plain: list[Tensor] = []
        large: list[Tensor] = []
        pieces: list[Piece] = []
        fused = self._fused_tasks(number, group)
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    f"RiemannianFGSGD: the gradient of {self._name_of(param)} is sparse, expected a dense one; "
                    "build the layer with sparse=False or use geoopt's SparseRiemannianSGD for it"
                )
            buffer = self._momentum_of(param) if group["momentum"] != 0 else None
            if param.numel() == 0:
                continue
            manifold = manifold_of(param)
            if fused is not None and manifold is not None and fused.renew(position, param, buffer):
                if left := fused.left(position):
                    pieces += pieces_of(param, manifold, buffer, left)
                continue
            if manifold is None and not group["adapt_euclidean"]:
                plain.append(param)
                continue
            momentum = self._momentum_like(param)
            buffer = momentum if group["momentum"] != 0 else None
            taken = fused is not None and fused.add(position, param, manifold, buffer)
            left = fused.left(position) if fused is not None and taken else ()
            if not taken and LargeKernels.takes(param, manifold, buffer) and self._is_moderate(group, param):
                large.append(param)
            elif left or not taken:
                pieces += pieces_of(param, manifold or self._default_manifold, momentum, left)
        jobs = join(pieces)
        for position, job in enumerate(jobs):
            self._project(group, job, f"{number}, {position}")
        return plain, [] if fused is None else fused.batches(_fused_options(group)), jobs, large

    def _project(self, options: _Options, job: Job, name: str) -> None:
        """Make the gradients of a job Riemannian, or take the products that stand for it; jobs have different names."""
        grad = -job.grad if options["maximize"] else job.grad
        if not isinstance(job.manifold, EmbeddedManifold):
            # Always a new tensor: Geoopt's Lorentz manifold writes into the gradient that it is given.
            grad = grad.add(job.x, alpha=options["weight_decay"])
        if _shares_products(options, job):
            along = self._workspace.square(job.x, f"along, {self._steps % 2}, {name}")
            job.grad, job.along = grad, small_product(job.x.mT, grad, out=along)
        else:
            job.grad = job.manifold.egrad2rgrad(job.x, grad)

    def _is_moderate(self, options: _Options, param: Tensor) -> bool:
        """Whether no norm on a product can overflow, as its gradient shows, or overflow is not refused."""
        if not _checks(options, param):
            return True
        manifold = cast(ProductOfGroups, manifold_of(param))
        radii = [m.radius_range[1] for m in manifold.manifolds if isinstance(m, ComponentManifold)]
        factor = max([1.0, *radii]) ** 2 if options["radius_invariant"] else 1.0
        return float(torch.linalg.vector_norm(torch.as_tensor(param.grad))) * factor <= _MODERATE

    def _fused_tasks(self, number: int, group: _Options) -> FusedTasks | TracedTasks | None:
        """What fused paths did in a group in the last step; None if they are not asked in this one."""
        circumstances = kernels.circumstances() if group["update"] == "retraction" else None
        if circumstances is None:
            if not torch.compiler.is_compiling():
                self._fused.pop(number, None)
                recorded = "operations are recorded, by a mode or a transform of torch"
                exponential = "fused steps know no exponential map"
                reason = exponential if group["update"] == "exponential" else recorded
                kernels.say_unfused(f"param_groups[{number}]", reason)
            return None
        if torch.compiler.is_compiling():
            return TracedTasks(_fused_options(group))
        fused = self._fused.setdefault(number, FusedTasks())
        fused.begin(circumstances, group["momentum"] != 0)
        return fused

    def _fused_norms(
        self, options: _Options, batch: kernels.Batch | kernels.TracedBatch
    ) -> tuple[Tensor, Tensor | None] | None:
        """Squared norm of the gradient of every group, and for which groups it is finite (None if for all).

        None if nothing has to be known of them before the step, and the path can measure while it takes it.
        """
        if isinstance(batch, kernels.Batch) and batch.by_rows:
            checks = _checks(options, batch.weights[0])
            if not checks or kernels.gradients_are_moderate(batch):
                return None
        squared = kernels.squared_norms(batch)
        largest = torch.finfo(batch.dtype).max  # the sums are in float64
        if reads_for_free(squared) and float(squared.sum()) <= largest:
            return squared, None
        finite = squared <= largest
        if not _checks(options, squared):
            self._count_skipped((~finite).sum())
        elif not bool(finite.all()):
            weights = zip(batch.weights, finite.split(batch.counts), strict=True)
            bad = next(weight for weight, ok in weights if not bool(ok.all()))
            raise self._not_finite(bad, cast(geoopt.Manifold, manifold_of(bad)))
        return squared, finite

    def _group_norms(self, options: _Options, job: Job) -> Tensor:
        """Squared norm of the gradient of every group, after refusing or leaving out what is not finite."""
        squared, finite = self._measured(options, job)
        if finite is None:
            return squared
        bad = next(p for p, ok in zip(job.pieces, job.split_groups(finite), strict=True) if not bool(ok.all()))
        raise self._not_finite(bad.param, bad.manifold)

    def _measured(self, options: _Options, job: Job) -> tuple[Tensor, Tensor | None]:
        """Squared norm of the gradient of every group; if some are to be refused, which of them are finite."""
        manifold, grad = job.manifold, job.grad
        radius = manifold.radius_for(job.x) if isinstance(manifold, ComponentManifold) else 1.0
        invariant = options["radius_invariant"] and isinstance(manifold, ComponentManifold)
        inner = None
        if job.along is not None:
            inner = tangent_square(grad, job.along, radius, self._workspace)
            if inner is None:  # little is left of the gradient, and much rounding
                job.along, job.grad = None, manifold.proju(job.x, grad)
            elif invariant:
                inner = inner * over_components(radius) ** 2
        if inner is None:
            grad = job.grad
            if invariant:
                job.grad = grad * radius**2
            inner = manifold.inner(job.x, grad, job.grad)  # if invariant, that of the gradient at radius one
        squared = job.sum(inner.real if inner.is_complex() else inner).clamp_min(0)  # Lorentz rounds below zero
        finite = torch.isfinite(squared)
        if reads_for_free(squared) and bool(finite.all()):
            return squared, None
        if not _checks(options, squared):
            self._count_skipped((~finite).sum())
            job.grad = torch.where(job.spread(finite), job.grad, 0)
            job.along = None if job.along is None else torch.where(job.spread(finite), job.along, 0)
            return torch.where(finite, squared, 0), None
        return squared, None if bool(finite.all()) else finite

    def _not_finite(self, param: Tensor, manifold: geoopt.Manifold) -> FloatingPointError:
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.is_floating_point()]
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):  # its gradients follow, and all others
            return self._broken_weight(weights, "no parameter was changed")
        return FloatingPointError(
            f"RiemannianFGSGD: the gradient of {self._name_of(param)} on {manifold} is not finite (or its "
            "squared norm overflows); no parameter was changed. Lower the learning rate, clip the gradient, or use a "
            "GradScaler in half precision"
        )

    def _stale(self, param: Tensor) -> RuntimeError:
        return RuntimeError(
            f"RiemannianFGSGD: {self._name_of(param)} is no parameter of its model any more: constrain or unconstrain "
            "has put another in its place; no parameter was changed. Build the optimiser after that, from what "
            "model.named_parameters() gives now"
        )

    def _broken_weight(self, weights: Sequence[Tensor], outcome: str) -> FloatingPointError:
        bad = next((weight for weight in weights if not bool(torch.isfinite(weight).all())), weights[0])
        return FloatingPointError(
            f"RiemannianFGSGD: {self._name_of(bad)} is not finite itself, or so large that its gradient with weight "
            f"decay is not; {outcome}. Go back to a checkpoint"
        )

    def _count_skipped(self, skipped: Tensor) -> None:
        before = self._skipped.get(skipped.device)
        self._skipped[skipped.device] = skipped if before is None else before + skipped

    # -- the step --------------------------------------------------------------------------------------------

    def _step_plain(self, group: _Options, params: list[Tensor]) -> None:
        """The step of torch.optim.SGD, by torch's own function."""
        if not params:
            return
        grads = [cast(Tensor, p.grad) for p in params]
        if group["nesterov"] and group["weight_decay"] == 0 and not group["maximize"]:
            grads = [g.clone() for g in grads]  # torch's multi-tensor Nesterov step writes into its gradients
        buffers: list[Tensor | None] = [self._momentum_of(p) for p in params]
        lr = group["lr"]
        sgd(
            params,
            grads,
            buffers,
            foreach=group["foreach"],
            fused=group["fused"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=cast(float, lr.squeeze() if isinstance(lr, Tensor) else lr),  # torch 2.6 takes no dimensions
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer

    def _move(
        self,
        options: _Options,
        job: Job,
        squared: Tensor,
        carried: Mapping[_Pieces, Carried],
        left: dict[_Pieces, Carried],
    ) -> list[_Result]:
        """Where a job goes, by pieces; what it leaves for the next step is added to ``left``.

        Nothing of the job is written but points that are whole, at its very end.
        """
        tau = _step_scale(options, job, squared.sqrt())
        bound = _step_bound(options, job, _longest_step(options))
        if job.along is not None:
            pieces = tuple((piece.param, piece.part) for piece in job.pieces)
            x, buffer, leaves = self._step_shared(options, job, tau, carried.get(pieces))
            if leaves is not None and job.x.dtype == job.pieces[0].param.dtype:  # half precision rounds the point
                left[pieces] = leaves
        else:
            x, buffer = fgsgd_update(
                job.manifold,
                job.x,
                job.grad if tau is None or _are_ones(tau) else job.grad / job.spread(tau),
                job.buffer,
                lr=options["lr"],
                momentum=options["momentum"],
                dampening=options["dampening"],
                nesterov=options["nesterov"],
                update=options["update"],
                bound=bound,
            )
        taus = job.split_groups(torch.ones_like(squared) if tau is None else tau)
        components = [None] * len(taus) if x is None else job.split(x)
        buffers = [None] * len(taus) if buffer is None else job.split(buffer)
        params, parts = [piece.param for piece in job.pieces], [piece.part for piece in job.pieces]
        return list(zip(params, parts, components, buffers, taus, strict=True))

    def _step_large(self, options: _Options, param: Tensor, broken: list[Tensor]) -> None:
        """The step of a weight of large kernels; if it is not finite itself, it is added to ``broken``."""
        buffer = self._momentum_of(param) if options["momentum"] != 0 else None
        kernels_of_param = LargeKernels(param, cast(ProductOfGroups, manifold_of(param)), buffer, self._workspace)
        taus: dict[int, Tensor] = {}
        momentum: Tensor | None = None
        for piece in kernels_of_param.pieces():
            (job,) = join([piece])
            self._project(options, job, "")
            squared, finite = self._measured(options, job)
            if finite is not None:
                broken.append(param)
                return
            ((_, part, x, momentum, taus[part]),) = self._move(options, job, squared, {}, {})
            kernels_of_param.put(part, cast(Tensor, x), momentum)
        if momentum is not None and buffer is None:
            buffer = self.state[param]["momentum_buffer"] = torch.empty_like(param)
        kernels_of_param.write(buffer)
        self._step_scales[param] = taus

    def _step_shared(
        self, options: _Options, job: Job, tau: Tensor | None, carried: Carried | None
    ) -> tuple[Tensor | None, Tensor, Carried | None]:
        """The step that shares products, given what the step before has left: points, momentum, and what it leaves.

        Points of a parameter that is a job are written to it, and None is returned of them. Momentum of a job that is
        whole holds until the next one.
        """
        manifold = cast(Stiefel, job.manifold)
        scale: float | Tensor = 1.0 if job.buffer is None else 1 - options["dampening"]
        if tau is not None:
            scale = scale / (float(tau) if tau.numel() == 1 else job.spread(tau))
        if options["radius_invariant"]:
            scale = scale * manifold.radius_for(job.x) ** 2
        x, buffer, leaves = shared_products_step(
            manifold,
            job.x,
            job.grad,
            cast(Tensor, job.along),
            job.buffer,
            carried,
            scale=scale,
            lr=float(options["lr"]),
            momentum=options["momentum"],
            workspace=self._workspace,
            out=job.x if job.is_whole else None,
        )
        is_written = job.is_whole and len(job.pieces) == 1 and job.pieces[0].is_view
        return None if is_written else x, buffer if job.is_whole else buffer.clone(), leaves

    def _seal(self, pieces: _Pieces) -> _Seal:
        """Parameters and momentum, and how often each was written to: what is carried holds until one of them changes.

        Writing to ``param.data`` is not counted, see :meth:`~fgo_geo.paths.shared_products.Carried.belongs_to`.
        """
        tensors = [tensor for param, _ in pieces for tensor in (param, self._momentum_of(param)) if tensor is not None]
        return tuple(
            (tensor, 0 if tensor.is_inference() else tensor._version)  # pyright: ignore[reportPrivateUsage]
            for tensor in tensors
        )

    def _step_fused(
        self,
        options: _Options,
        batch: kernels.Batch | kernels.TracedBatch,
        measured: tuple[Tensor, Tensor | None] | None,
        broken: list[Tensor],
    ) -> None:
        """The step of a batch; if one of its weights is not finite itself, they are added to ``broken``."""
        _longest_step(options)  # the batched code may take over after a change of path
        for param, buffer in batch.fresh_buffers():
            self.state[param]["momentum_buffer"] = buffer
        if measured is None:
            tau, left_out = kernels.step_by_rows(cast(kernels.Batch, batch))
            if left_out and _checks(options, tau):
                broken += batch.weights
            elif left_out:
                self._count_skipped(torch.tensor(left_out, device=tau.device))
        else:
            squared, finite = measured
            # 1 / τ is needed in the precision of the weights only; R² was added up in float64.
            norm = (squared if finite is None else torch.where(finite, squared, 0)).sqrt().to(batch.dtype)
            tau = _fused_step_scale(batch, norm)
            scale = tau.reciprocal() if finite is None else torch.where(finite, 1 / tau, 0)
            kernels.update(batch, scale, skips=finite is not None)
        self._fused_scales.append((batch.weights, batch.counts, tau))

    def _write(self, results: list[_Result]) -> None:
        """Put the new components of every parameter back where they came from."""
        by_param: dict[Tensor, list[_Result]] = {}
        for result in results:
            by_param.setdefault(result[0], []).append(result)
        for param, parts in by_param.items():
            manifold = manifold_of(param) or self._default_manifold
            put_back(param, manifold, {part: x for _, part, x, _, _ in parts if x is not None})
            self._step_scales[param] = {part: tau for _, part, _, _, tau in parts}
            buffers = {part: buffer for _, part, _, buffer, _ in parts if buffer is not None}
            if buffers:
                state = self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.empty_like(param)
                put_back(state["momentum_buffer"], manifold, buffers)


def _is_unbroken(seal: _Seal, now: _Seal) -> bool:
    """Whether the same tensors have been written to as often."""
    return len(seal) == len(now) and all(a is b and m == n for (a, m), (b, n) in zip(seal, now, strict=True))


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError if an option of a parameter group is out of range."""
    lr, momentum = options["lr"], options["momentum"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"RiemannianFGSGD: lr must be a number or hold one element, got shape {tuple(lr.shape)}")
    for name in ("lr", "momentum", "weight_decay", "rho"):
        value = options[name]
        if not value >= 0:
            raise ValueError(f"RiemannianFGSGD: {name} must be at least 0, got {value!r}")
    for name in ("lr", "rho"):
        if not options[name] < math.inf:
            raise ValueError(f"RiemannianFGSGD: {name} must be finite, got {options[name]!r}")
    if options["fused"] and options["foreach"]:
        raise ValueError("RiemannianFGSGD: fused and foreach exclude each other, got True for both")
    if options["nesterov"] and (momentum <= 0 or options["dampening"] != 0):
        raise ValueError(
            "RiemannianFGSGD: nesterov needs momentum > 0 and dampening = 0, "
            f"got momentum={momentum!r}, dampening={options['dampening']!r}"
        )
    for name, choices in (("step_size", get_args(StepSize)), ("update", get_args(Update))):
        if options[name] not in choices:
            raise ValueError(f"RiemannianFGSGD: {name} must be one of {choices}, got {options[name]!r}")
    curvature = options["curvature"]
    if curvature not in (None, "manifold") and not (isinstance(curvature, (int, float)) and 0 <= curvature < math.inf):
        raise ValueError(
            f'RiemannianFGSGD: curvature must be None, "manifold" or a finite number of at least 0, got {curvature!r}'
        )
    stabilize = options["stabilize"]
    if stabilize is not None and not (isinstance(stabilize, int) and stabilize > 0):
        raise ValueError(f"RiemannianFGSGD: stabilize must be None or a positive integer, got {stabilize!r}")


def _check_rate(lr: object) -> None:
    """Raise ValueError if a learning rate that was changed since is out of range; a tensor is not read."""
    if not isinstance(lr, Tensor) and not (isinstance(lr, numbers.Real) and 0 <= float(lr) < math.inf):
        raise ValueError(
            f"RiemannianFGSGD: lr must be a finite number of at least 0, got {lr!r}; no parameter was changed. "
            "Look at what has set param_groups[...]['lr'] since the last step"
        )


def _register(param: Tensor) -> None:
    """Let a compiled step find a parameter's manifold."""
    manifold = manifold_of(param)
    if isinstance(manifold, EmbeddedManifold):
        kernels.register(manifold)


def _check_point(param: Tensor, name: Callable[[], str]) -> None:
    """Raise ValueError if a parameter is far from its manifold; move the manifold to the parameter's device."""
    manifold = manifold_of(param)
    _register(param)
    if isinstance(manifold, EmbeddedManifold) and not param.is_meta:
        manifold.to(param.device)
        manifold.require_point(
            param.detach(), f"RiemannianFGSGD: {name()}", "move it there by `with torch.no_grad(): param.proj_()`"
        )


def _are_ones(tau: Tensor) -> bool:
    """Whether it can be read for free that dividing by ``τ`` changes nothing, as for most gradients it does not."""
    return reads_for_free(tau) and bool((tau == 1).all())


def _step_scale(options: _Options, job: Job, norm: Tensor) -> Tensor | None:
    """The divisors of the learning rate, one per group; None for a constant step."""
    if options["step_size"] == "constant":
        return None
    curvature = options["curvature"]
    if curvature is None:
        return theorem_step_scale(norm, options["rho"])
    if curvature != "manifold":
        return theorem_step_scale(norm, options["rho"], curvature)
    if isinstance(job.manifold, geoopt.Euclidean):
        return theorem_step_scale(norm, options["rho"], 0.0)
    if options["radius_invariant"] or not isinstance(job.manifold, ComponentManifold):
        return theorem_step_scale(norm, options["rho"])
    own = job.manifold.curvature_bound
    if not isinstance(own, Tensor):
        return theorem_step_scale(norm, options["rho"], own)
    own = own.to(dtype=norm.dtype, device=norm.device)
    batch = job.x.shape[: -job.manifold.ndim]
    return theorem_step_scale(norm, options["rho"], job.groups.max(own.expand(batch).flatten()))


def _shares_products(options: _Options, job: Job) -> bool:
    """Whether a job takes the step that shares products: where these are what it costs, and reading is free."""
    plain = options["momentum"] != 0 and not options["nesterov"] and options["update"] == "retraction"
    large = type(job.manifold) is Stiefel and job.manifold.retraction == "polar" and job.x.shape[-1] >= _LARGE_MATRIX
    return plain and large and reads_for_free(job.x)


def _checks(options: _Options, norms: Tensor) -> bool:
    """Whether to raise on norms that are not finite: if asked to, or if reading them is free."""
    asked = options["check_finite"]
    if asked is None:
        return norms.device.type == "cpu" and not torch.compiler.is_compiling()
    if asked and torch.compiler.is_compiling():  # the graph ends here; with fullgraph=True that is an error, which says
        torch._dynamo.graph_break(  # pyright: ignore[reportPrivateUsage]
            msg=f"RiemannianFGSGD: check_finite={asked!r} cannot raise inside torch.compile(..., fullgraph=True); "
            "nothing has changed. Leave it None or set it to False: groups whose gradient is not finite then take none "
            "in the step, and optimizer.skipped_groups() counts them"
        )
    return asked


def _fused_options(options: _Options) -> kernels.StepOptions:
    curvature = options["curvature"]
    return kernels.StepOptions(
        lr=options["lr"],
        momentum=options["momentum"],
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        weight_decay=options["weight_decay"],
        maximize=options["maximize"],
        radius_invariant=options["radius_invariant"],
        constant=options["step_size"] == "constant",
        rho=options["rho"],
        curvature=1.0 if curvature is None else None if curvature == "manifold" else curvature,
    )


def _fused_step_scale(batch: kernels.Batch | kernels.TracedBatch, norm: Tensor) -> Tensor:
    """The divisors of the learning rate, one per group of all tasks; ones for a constant step."""
    options = batch.options
    if options.constant:
        return torch.ones_like(norm)
    own = options.curvature is None
    bound = kernels.curvature(batch, norm, options.radius_invariant) if own else options.curvature
    return theorem_step_scale(norm, options.rho, cast("float | Tensor", bound))


def _longest_step(options: _Options) -> float:
    """Bound on the length of a step per unit of learning rate.

    With momentum it never falls: what a larger momentum has put into the buffers is still there after it has dropped.
    """
    longest = math.inf
    if options["step_size"] == "theorem":
        gain = momentum_gain(options["momentum"], options["dampening"], options["nesterov"])
        longest = theorem_step_bound(options["rho"]) * gain
    if options["momentum"] != 0:
        longest = options["longest_step"] = max(longest, options["longest_step"])
    return longest


def _step_bound(options: _Options, job: Job, longest: float) -> float | None:
    """Bound on the length of a step relative to the radius, None if there is none."""
    if longest == math.inf or not isinstance(job.manifold, ComponentManifold):
        return None
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.device.type != "cpu" or torch.compiler.is_compiling():
            return _UNKNOWN_LR_BOUND
        lr = float(lr)
    radius = 1.0 if options["radius_invariant"] else job.smallest_radius
    return abs(lr) * longest / radius
