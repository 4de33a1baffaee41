"""The parameters of an optimiser: checks when they are added, names in messages, and what is kept per parameter.

:func:`parameters_given` and :func:`check_point` check what a constructor gets, :func:`name_in` names a parameter in
messages, :class:`Held` remembers on which manifolds parameters were given, :class:`StepScales` maps parameters to the
``τ`` of a step, and :class:`Masters` holds single-precision copies of half-precision weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import geoopt
import torch
from torch import Tensor, nn

from fgo_geo.linalg import cut_of, is_sharded, local_part, whole, write_whole
from fgo_geo.manifolds import EmbeddedManifold, ProductOfGroups, is_declared, known_name
from fgo_geo.optim.base import manifold_of
from fgo_geo.optim.groups import group_norms
from fgo_geo.optim.requests import StepRequest
from fgo_geo.weights.kinds import kind
from fgo_geo.weights.words import described, did_you_mean, few

__all__ = [
    "HALF",
    "Held",
    "Masters",
    "StepScales",
    "check_point",
    "name_in",
    "parameters_given",
]

HALF = (torch.float16, torch.bfloat16)
"""Types of weights that have a master copy."""


def check_point(param: Tensor, what: str, step_size: str) -> None:
    """Raise if a parameter is far from its manifold or in shards that hide it; move the manifold to its device.

    For a sharded parameter, all processes have to call this.

    Args:
        param: Any parameter.
        what: Optimiser and name of the parameter, for messages.
        step_size: How steps are scaled.

    Raises:
        ValueError: If the parameter is off its manifold, or ``step_size="angle"`` needs a norm that its manifold does
            not fix.
    """
    manifold = manifold_of(param)
    _require_known_shards(param, what)
    if isinstance(manifold, EmbeddedManifold) and not param.is_meta:
        manifold.to(param.device)
        manifold.require_point(whole(param).detach(), what, "move it there by `with torch.no_grad(): param.proj_()`")
    if step_size == "angle" and manifold is not None:
        has_free = isinstance(manifold, ProductOfGroups) and any(
            kind(name).is_free for name in manifold.partition.kinds
        )
        if bool(group_norms(manifold, tuple(param.shape)).isnan().any()) and not has_free:
            raise ValueError(
                f"{what}: step_size='angle' needs a weight of fixed norm, and {manifold} does not fix one; use "
                "step_size='constant' for this weight, in a separate parameter group"
            )


def _require_known_shards(param: Tensor, what: str) -> None:
    """Raise if a parameter is a shard whose manifold is not known, or cannot be kept."""
    if getattr(param, "_is_flat_param", False) or (getattr(param, "_fsdp_flattened", False) and manifold_of(param)):
        raise ValueError(
            f"{what} is a flat shard of FullyShardedDataParallel, which can hold any part of a point on a manifold; "
            "shard the model with fgo_geo.distributed.fully_shard (FSDP2) instead"
        )
    if not is_sharded(param):
        return
    if not is_declared(param):
        raise ValueError(
            f"{what} is a sharded tensor (DTensor), and sharding drops the manifold of a parameter: shard the model "
            "with fgo_geo.distributed.fully_shard, which takes the arguments of torch's and keeps manifolds; or, if it "
            "is sharded already, call plan_of(model).attach(model) if it was constrained by fgo_geo.constrain, or "
            "fgo_geo.distributed.declare_plain(model) if none of its parameters is on a manifold"
        )
    if manifold_of(param) is None:
        return
    try:
        cut_of(param)
    except ValueError as error:
        raise ValueError(f"{what} is on a manifold and has {error}") from error
    device = getattr(param, "device_mesh").device_type  # noqa: B009  a DTensor has it
    if not param.is_meta and local_part(param).device.type != device:
        raise ValueError(
            f"{what} is on a manifold, and its shards are on {local_part(param).device.type}, but its device mesh is "
            f"on {device}: CPU offload is not supported; leave offload_policy out"
        )


def _require_copyable(param: Tensor, what: str) -> None:
    """Raise ValueError if a parameter needs a copy in single precision and cannot have one, as it is sharded."""
    if param.dtype in HALF and is_sharded(param) and manifold_of(param) is not None:
        raise ValueError(
            f"{what} is sharded, on a manifold and of type {param.dtype}: sharded weights cannot have copies in single "
            "precision. Keep the weights in float32 and compute with "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16), or pass master_weights=False"
        )


def parameters_given(params: object, optimizer: str) -> list[Any]:
    """The parameters, or parameter groups, that a constructor was given.

    Args:
        params: The argument that should hold the parameters.
        optimizer: Name of the optimiser, for messages.

    Raises:
        TypeError: If it holds no parameters.
        ValueError: If it is empty.
    """
    what, remedy = f"{optimizer}: params is {described(params)}", "pass model.named_parameters() of your model"
    if isinstance(params, Tensor):
        raise TypeError(f"{what}, expected a list of parameters; put it in brackets, [w]")
    if isinstance(params, Mapping):
        raise TypeError(
            f"{what} with names as keys, expected parameters; {remedy} (a plan lists only constrained parameters)"
        )
    if isinstance(params, (str, nn.Module)) or not isinstance(params, Iterable):
        raise TypeError(f"{what}, expected parameters; {remedy}")
    listed = list(cast("Iterable[Any]", params))
    if not listed:
        raise ValueError(
            f"{optimizer}: got an empty parameter list. A generator like model.parameters() is empty after its first "
            "use: call model.named_parameters() again for every use"
        )
    if isinstance(listed[0], nn.Module):
        raise TypeError(f"{optimizer}: params holds {described(listed[0])}, expected parameters; {remedy}")
    return listed


def name_in(optimizer: torch.optim.Optimizer, param: Tensor) -> str:
    """How messages refer to a parameter: its name and its place.

    The name is the one that the optimiser was given, or else the one by which ``constrain`` knows it.
    """
    shape = f"of shape {tuple(param.shape)}"
    for candidate, name, place in _named(optimizer):
        if candidate is param:
            return f"{place} {shape}" if name is None else f"{name!r}, {place} {shape}"
    name = known_name(param)
    return f"a parameter {shape}" if name is None else f"{name!r} {shape}"


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str | None, str]]:
    """Every parameter of an optimiser with its name, if it is known, and its place."""
    for number, group in enumerate(optimizer.param_groups):
        params, names = group["params"], group.get("param_names") or ()
        if len(names) != len(params):  # no names were given, or the list of parameters was changed afterwards
            names = map(known_name, params)
        for position, (param, name) in enumerate(zip(params, names, strict=True)):
            yield param, name, f"param_groups[{number}]['params'][{position}]"


class Held:
    """The parameters that an optimiser holds, and the manifolds that they had when it was built.

    Args:
        optimizer: The optimiser. Its groups have the options ``"step_size"`` and ``"master_weights"``.

    Attributes:
        manifolds: The manifolds by parameter.
        counts: How many parameters each group had at the latest :meth:`renew`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.manifolds: dict[Tensor, geoopt.Manifold] = {}
        self.counts: list[int] = []

    def name_of(self, param: Tensor) -> str:
        """How messages refer to a parameter."""
        return name_in(self._optimizer, param)

    def _what(self, param: Tensor) -> str:
        return f"{type(self._optimizer).__name__}: {self.name_of(param)}"

    def check(self, group: dict[str, Any]) -> None:
        """Raise if the parameters of a group cannot be stepped, see :func:`check_point`.

        Args:
            group: The parameter group.

        Raises:
            ValueError: If they cannot.
        """
        for param in group["params"]:
            check_point(param, self._what(param), group["step_size"])
            if group["master_weights"]:
                _require_copyable(param, self._what(param))

    def renew(self) -> None:
        """Add parameters that are new in the groups, and drop those that are no longer there."""
        groups = self._optimizer.param_groups
        self.counts = [len(group["params"]) for group in groups]
        manifolds = {p: self.manifolds.get(p) or manifold_of(p) for group in groups for p in group["params"]}
        self.manifolds = {param: manifold for param, manifold in manifolds.items() if manifold is not None}


class StepScales(dict[Tensor, Tensor]):
    """Divisors ``τ`` by parameter. ``[]``, ``in`` and ``get`` take names, too; ``[]`` says why a parameter is missing.

    Iteration yields the parameters. They are printed as names.

    Args:
        scales: The divisors.
        optimizer: The optimiser whose latest step it was.
    """

    def __init__(self, scales: Mapping[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(scales)
        self._optimizer = optimizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain dictionaries."""
        return dict, (dict(self),)

    def __contains__(self, key: object) -> bool:
        return self.get(key) is not None

    def get(self, key: Any, default: Any = None) -> Any:
        """The divisors of a parameter or of a name; ``default`` if there are none."""
        params = self._params_of(key) if isinstance(key, str) else [key]
        return super().get(params[0], default) if len(params) == 1 else default

    def __repr__(self) -> str:
        labels = {param: place if name is None else repr(name) for param, name, place in _named(self._optimizer)}
        return f"{{{', '.join(f'{labels.get(param)}: {tau!r}' for param, tau in self.items())}}}"

    def __missing__(self, param: object) -> Tensor:
        if isinstance(param, str):
            return self[self._only_param_of(param)]
        if not isinstance(param, Tensor):
            raise KeyError(f"step scales are read by parameter or by its name, e.g. 'fc.weight', not by {param!r}")
        name = name_in(self._optimizer, param)
        if not self:
            raise KeyError(f"{name} has no step scale: call optimizer.step() first, after a backward pass")
        why = "it is not on a manifold" if manifold_of(param) is None else "it had no gradient in the latest step"
        raise KeyError(f"{name} has no step scale: {why}")

    def _params_of(self, name: str) -> list[Tensor]:
        return [param for param, own, _ in _named(self._optimizer) if own == name]

    def _only_param_of(self, name: str) -> Tensor:
        found = self._params_of(name)
        if len(found) == 1:
            return found[0]
        if found:
            raise KeyError(
                f"the optimiser has {len(found)} parameters of the name {name!r}: read the scale by parameter"
            )
        known = [own for _, own, _ in _named(self._optimizer) if own is not None]
        remedy = f"the names are {few(known)}" if known else "build the optimiser from model.named_parameters()"
        raise KeyError(f"the optimiser knows no parameter of the name {name!r}; {remedy}{did_you_mean(name, known)}")


class Masters:
    """Copies in single precision of half-precision weights, in the optimiser's state under ``"master"``.

    Args:
        state: The optimiser's state by parameter.

    Attributes:
        versions: Torch's count of changes of each weight, when it was the same as its copy.
    """

    def __init__(self, state: dict[Tensor, Any]) -> None:
        self._state = state
        self.versions: dict[Tensor, int] = {}

    def of(self, param: Tensor, manifold: geoopt.Manifold) -> Tensor:
        """The copy of a weight; a new one if other code has written to the weight since the last step."""
        state = self._state[param]
        master = state.get("master")
        if master is None or master.device != param.device or self.versions.get(param) != param._version:
            if master is None or not torch.equal(master.to(param), param):
                master = state["master"] = manifold.projx(param.detach().float())
            self.written(param)
        return master

    def written(self, param: Tensor) -> None:
        """Remember that the weight is its copy, rounded."""
        self.versions[param] = param._version

    def written_back(self, requests: Sequence[StepRequest]) -> None:
        """The same for all weights of a step that have moved as their copies."""
        for request in requests:
            for weight in request.weights:
                if weight.owner is not weight.param and weight.owner.dtype in HALF:
                    self.written(weight.owner)

    def project(self, param: Tensor, manifold: geoopt.Manifold, *, keeps: bool) -> Tensor:
        """Project a weight onto its manifold; returns what a step moves: the weight, or its copy.

        Args:
            param: The weight.
            manifold: Its manifold.
            keeps: Whether its steps keep a copy. One that they do not keep is dropped.
        """
        state = self._state.get(param, {})
        if not keeps or param.dtype not in HALF:
            state.pop("master", None)
        point = self.of(param, manifold) if "master" in state else param
        write_whole(point, manifold.projx(whole(point)))
        if point is not param:
            param.copy_(point)
            self.written(param)
        return point

    def load(self, param_groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
        """Load the state of half-precision weights on manifolds again, which torch has rounded to their type.

        Args:
            param_groups: Those of the optimiser.
            state_dict: What the optimiser has loaded.
        """
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        params = (param for group in param_groups for param in group["params"])
        for number, param in zip(numbers, params, strict=True):
            if param.dtype in HALF and manifold_of(param) is not None:
                for name, value in state_dict["state"].get(number, {}).items():
                    copy = value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                    self._state[param][name] = copy
