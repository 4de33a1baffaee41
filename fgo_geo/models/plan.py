r"""The record of how a model is constrained, and the hooks that keep it constrained.

The :class:`Plan` belongs to the model. The metadata of ``state_dict`` contains it, so saving and loading restores
groups and radii exactly. The plan also detects when torch has silently turned weights into plain parameters (by
``to("meta")``, ``to_empty`` or sharding): the next forward pass raises an error that names :meth:`Plan.attach`. Models
inside ``torch.compile`` do not check this; call :meth:`Plan.check` there. After ``load_state_dict`` the plan attaches
itself again.

``load_state_dict`` rejects values that are off the manifolds before anything has changed. A deep copy of the model is
the exception, because EMA and SWA keep averages in one, and averages are off the manifolds: it loads the values
unchanged, and only a forward pass in training mode raises an error.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import geoopt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgo_geo.linalg import write_whole
from fgo_geo.manifolds import ProductOfGroups, mark_replaced
from fgo_geo.models.entry import PlanEntry, table_of
from fgo_geo.models.feature_stats import is_tracked, track, untrack
from fgo_geo.models.loading import OF_AN_AVERAGE, WITHOUT_PLAN
from fgo_geo.models.replicas import check_replicas
from fgo_geo.models.sharded import recover, reshard, value_of
from fgo_geo.models.slips import NoModel
from fgo_geo.models.start import nearest_point
from fgo_geo.models.surgery import (
    dilate,
    is_lost,
    layers_of,
    measured_scales,
    parameter_of,
    put_on_manifolds,
    require_finite_values,
    require_ties,
    targets_of,
    write_points,
)
from fgo_geo.models.watch import Watch
from fgo_geo.weights.kinds import UnregisteredKindError
from fgo_geo.weights.words import few

__all__ = ["Plan", "plan_of", "plans_of"]

PLAN_ATTRIBUTE = "fgo_geo_plan"  # where a model keeps its plan
_METADATA = "fgo_geo_plan"  # where a state_dict keeps it
_JSON_VERSION = 1


@dataclass(eq=False)
class Plan(NoModel):
    """What :func:`~fgo_geo.constrain` did to a model, parameter by parameter; ``print`` shows a table.

    Attributes:
        entries: One per parameter, in the order of the model.
        model: The model that it describes; None for a plan that was read from JSON and not attached yet.
        is_average: Whether the model may load values that are off its manifolds, such as averages of weights. True in a
            deep copy of a model, because EMA and SWA keep averages in one. Set it for other averages.
        watches: Whether training looks for weights that have left their manifolds, see :mod:`fgo_geo.models.watch`.
    """

    entries: tuple[PlanEntry, ...]
    model: nn.Module | None = field(default=None, repr=False)
    is_average: bool = field(default=False, repr=False)
    watches: bool = field(default=True, repr=False)
    _handles: list[Any] = field(default_factory=list, repr=False)
    _tracked: set[str] = field(default_factory=set, repr=False)
    _off: tuple[str, ...] = field(default=(), repr=False)  # loaded off their manifolds
    _before_assign: tuple[nn.Parameter, ...] = field(default=(), repr=False)  # while load_state_dict(assign=True) runs

    @property
    def constrained(self) -> tuple[PlanEntry, ...]:
        """The entries of the parameters that are on a manifold."""
        return tuple(entry for entry in self.entries if entry.constrained)

    def parameters(self) -> dict[str, geoopt.ManifoldParameter]:
        """The constrained parameters by name.

        Raises:
            RuntimeError: If one of them has become a plain parameter.
            ValueError: If the plan is not attached to a model.
        """
        self.require_kept()
        model = self._require_model()
        reshard(model)
        return {e.name: cast(geoopt.ManifoldParameter, model.get_parameter(e.name)) for e in self.constrained}

    def check(self) -> None:
        """Raise if a constrained parameter has become a plain one, or one of the model is not finite on this process.

        Raises:
            RuntimeError: With the names of the plain ones and the remedy.
            ValueError: With the names of those that are not finite, or if the plan is not attached to a model.
        """
        self.require_kept()
        require_finite_values(self._require_model().named_parameters())

    def require_kept(self) -> None:
        """Raise RuntimeError if a constrained parameter has become a plain one."""
        lost = self.lost()
        if lost:
            raise RuntimeError(
                f"{len(lost)} constrained parameter(s) have become plain parameters or are gone: {few(lost)}. Moving "
                "to the meta device, to_empty and torch's sharding drop the manifold (fgo_geo.distributed.fully_shard "
                "keeps it): load the values, call plan_of(model).attach(model), and build the optimiser after that. If "
                "you have replaced a layer, call unconstrain(model) and constrain it again"
            )

    def attach(self, model: nn.Module, *, project: bool = False) -> Plan:
        """Put a model's parameters (back) on the manifolds of this plan. Values change only with ``project``.

        Parameters that are already on manifolds stay the same objects. Parameters that only the model's former plan
        constrains become plain.

        Args:
            model: A model with the plan's parameter names and shapes.
            project: Move the values to the nearest points. Use it for weights that were not trained on these manifolds.

        Returns:
            This plan, now the model's.

        Raises:
            ValueError: If a parameter is missing, has another shape, or is off its manifold, or the plan belongs to
                another model. In each case nothing has changed.
        """
        if self.model is not None and self.model is not model:
            raise ValueError(
                "this plan belongs to another model already; attach a copy, Plan.from_json(plan.to_json()), instead"
            )
        reshard(model)
        targets = targets_of(model, self.constrained)
        if recover(model, (param for _, param, _ in targets)):
            targets = targets_of(model, self.constrained)
        points: list[Tensor | None] = []
        for entry, param, manifold in targets:
            require_ties(model, entry)
            value = value_of(param)
            require_finite_values([(entry.name, value)])
            if not (project or value.is_meta):
                manifold.require_point(value, repr(entry.name), "pass project=True to project it")
            points.append(nearest_point(manifold, value) if project and not value.is_meta else None)
        write_points(targets, points)
        put_on_manifolds(model, targets, _constrained_in(model))
        self._off = ()
        return self.settle(model)

    def project(self) -> None:
        """Move every constrained parameter to the nearest point of its manifold, in place.

        Use it after code that ignores manifolds has changed weights, for example on the averages of
        :class:`torch.optim.swa_utils.AveragedModel`: ``plan_of(averaged).project()``. Raises
        ValueError if a weight is not finite, with nothing changed. For a sharded model, all processes must call this.
        """
        params = self.parameters()
        require_finite_values((name, value_of(param)) for name, param in params.items())  # all processes or none raise
        with torch.no_grad():
            for param in params.values():
                write_whole(param, nearest_point(cast(Any, param).manifold, value_of(param)))
        self._off = ()

    def projected(self, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """A copy of a state dict with the nearest points of this plan's manifolds, for ``load_state_dict``.

        Use it to continue training from averages of weights or from plain weights, because ``load_state_dict`` rejects
        values that are off their manifolds. The copy's metadata contains no plan.

        Args:
            state_dict: Values by name.
            prefix: The text before the names of this plan, e.g. ``"module."``.

        Returns:
            The same keys in the same order, for the model of this plan.

        Raises:
            ValueError: If none of the constrained weights is there, or one has another shape or is not finite.

        Example:
            >>> from fgo_geo import constrain
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            >>> plain = {name: value.clone() for name, value in model.state_dict().items()}
            >>> plan = constrain(model)
            >>> model.load_state_dict(plan.projected(plain))
            <All keys matched successfully>
        """
        result = OrderedDict(state_dict)
        keys = [(entry, prefix + name) for entry in self.constrained for name in entry.names]
        found = [(entry, key) for entry, key in keys if key in result]
        if not found:
            raise ValueError(
                f"the state_dict has none of this plan's weights under the prefix {prefix!r}: it has "
                f"{few(list(result))}, expected {few([key for _, key in keys])}"
            )
        for entry, key in found:
            value = entry.checked_value(result[key], key)
            require_finite_values([(f"{key} in the state_dict", value)])
            result[key] = nearest_point(self._manifold_of(entry), value)
        metadata = {name: dict(local) for name, local in getattr(state_dict, "_metadata", {}).items()}
        metadata.get(prefix.rstrip("."), {}).pop(_METADATA, None)
        cast(Any, result)._metadata = metadata
        return result

    @torch.no_grad()
    def update_scales(
        self, optimizer: torch.optim.Optimizer | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        """Refresh the statistical factor ``λ`` of the radii ``γ / λ``, once per epoch ([Ozay2019]_, algorithm 1).

        It uses the running statistics of the layers' inputs in training. The dilation that maps the old manifold to the
        new one moves points and momentum, so both stay valid. Layers whose own ``forward`` is never called, the packed
        and the output projection of attention, keep ``λ = 1``. A tied weight uses the root mean square over its layers.

        If ``torch.distributed`` is initialised, all processes of the group must call this; they get equal radii.

        Args:
            optimizer: The optimiser whose ``momentum_buffer`` the method scales, too. Without it, momentum keeps its
                length.
            group: The processes that see different data; None for all.

        Raises:
            ValueError: If features were not finite. Nothing has changed then.
        """
        model, params = self._require_model(), self.parameters()
        entries = tuple(
            replace(e, channel_scales=measured_scales(model, e, group)) if e.statistics else e for e in self.entries
        )
        changed = [new for new, old in zip(entries, self.entries, strict=True) if new != old]
        radii = [entry.radii(cast(Any, params[entry.name]).manifold.partition) for entry in changed]
        for entry, radius in zip(changed, radii, strict=True):
            param = params[entry.name]
            state = {} if optimizer is None else optimizer.state.get(param, {})
            dilate(param, radius, state.get("momentum_buffer"))
        self.entries = entries

    def to_json(self) -> str:
        """The plan as JSON, with the groups themselves, so that it does not depend on how they were drawn."""
        return json.dumps({"version": _JSON_VERSION, "entries": [entry.to_dict() for entry in self.entries]})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of :meth:`to_json`; :meth:`attach` it to a model.

        Args:
            text: What :meth:`to_json` returned.

        Raises:
            ValueError: If the text is of another version, or damaged, or names a manifold kind that is not registered.
        """
        try:
            data = json.loads(text)
            version = data["version"]
        except (ValueError, KeyError, TypeError) as error:
            where = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"expected the JSON text of a plan (Plan.to_json), got {text!r:.60}{where}") from error
        if version != _JSON_VERSION:
            raise ValueError(
                f"this plan has version {version!r}, expected {_JSON_VERSION}: read it with the fgo_geo that wrote it, "
                "or constrain the model again"
            )
        try:
            return cls(tuple(PlanEntry.from_dict(entry) for entry in data["entries"]))
        except UnregisteredKindError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this plan is damaged ({error!r}): restore it from another copy") from error

    def __repr__(self) -> str:
        """The number of constrained parameters, in one line."""
        attached = "no model" if self.model is None else type(self.model).__name__
        return f"<Plan of {attached}: {len(self.constrained)} of {len(self.entries)} parameters constrained>"

    def __str__(self) -> str:
        """A table of the constrained parameters, the reasons for the others, and a summary."""
        return table_of(self.entries, self._manifold_of)

    def _manifold_of(self, entry: PlanEntry) -> ProductOfGroups:
        param = None if self.model is None else parameter_of(self.model, entry.name)
        attached = getattr(param, "manifold", None)
        return attached if isinstance(attached, ProductOfGroups) else entry.manifold()

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """The plan of a deep copy of the model, which may be an average."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo), is_average=True)
        return twin

    def lost(self) -> list[str]:
        """Names of the constrained parameters that have become plain ones or are gone."""
        model = self._require_model()
        return [entry.name for entry in self.entries if entry.reason is None and is_lost(model, entry.name)]

    def check_training(self) -> None:
        """Raise if a forward pass of training uses values that were loaded off their manifolds and still are.

        Raises:
            RuntimeError: With the names, and what to call.
        """
        if not (self._off and self._require_model().training and torch.is_grad_enabled()):
            return
        params = self.parameters()
        try:
            for name in self._off:
                if params[name].requires_grad:
                    cast(Any, params[name]).manifold.require_point(value_of(params[name]), repr(name), "")
        except ValueError as error:
            raise RuntimeError(
                f"{len(self._off)} constrained parameter(s) were loaded off their manifolds and cannot be trained: "
                f"{few(self._off)}. For an average of weights, compute under torch.no_grad() or in evaluation mode; to "
                f"train, call plan_of(model).project() first. {error}"
            ) from error

    def before_load(self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> None:
        """Adopt the plan of a state dict, after rejecting what does not fit.

        Args:
            state_dict: Values by name.
            prefix: Prefix of this plan's names in the state dict.
            local_metadata: The metadata of this plan's model.

        Raises:
            ValueError: If the stored plan is damaged or of another model, or a constrained weight has another shape, is
                not finite, or is off its manifold in a model that is not an average. Nothing has changed then.
        """
        model, text = self._require_model(), local_metadata.get(_METADATA)
        reshard(model)
        entries = self.entries if text is None else _stored_entries(text)
        targets = targets_of(model, (entry for entry in entries if entry.constrained))
        present = [target for target in targets if prefix + target[0].name in state_dict]
        absent = [entry.name for entry, *_ in targets if prefix + entry.name not in state_dict]
        if absent and entries != self.entries:
            raise ValueError(
                f"the state_dict has another plan than the model and lacks {few(absent)}, so the weights that the "
                "model keeps would be on the wrong manifolds; load the whole state_dict, or constrain the model with "
                "the same settings"
            )
        off = [name for name in self._off if name in absent]
        for entry, _, manifold in present:
            key = prefix + entry.name
            value = entry.checked_value(state_dict[key], key)
            if value.is_meta:
                continue
            try:
                manifold.require_point(
                    value, f"{key!r} in the state_dict", WITHOUT_PLAN if text is None else OF_AN_AVERAGE
                )
            except ValueError:
                if not (self.is_average and bool(value.isfinite().all())):
                    raise
                off.append(entry.name)
        if entries != self.entries:
            put_on_manifolds(model, targets, self.constrained)
            self.entries = entries
            self.track()
        self._off = tuple(off)
        assigns = local_metadata.get("assign_to_params_buffers", False)
        self._before_assign = tuple(model.parameters()) if assigns else ()

    def after_load(self) -> None:
        """Put assigned parameters back on their manifolds, and mark the parameters that they have replaced."""
        model = self._require_model()
        if self.lost():
            targets = targets_of(model, self.constrained)
            for entry, param, manifold in targets:
                require_ties(model, entry)
                if not (param.is_meta or entry.name in self._off):
                    manifold.require_point(value_of(param), repr(entry.name), "load all weights")
            put_on_manifolds(model, targets)
        kept = set(map(id, model.parameters()))
        for param in self._before_assign:
            if id(param) not in kept:
                mark_replaced(param)
        self._before_assign = ()

    def _require_model(self) -> nn.Module:
        if self.model is None:
            raise ValueError("this plan is not attached to a model: call plan.attach(model)")
        return self.model

    def settle(self, model: nn.Module) -> Plan:
        """Make this the plan of a model, and register its hooks."""
        before = model.__dict__.get(PLAN_ATTRIBUTE)
        if before is not self:
            if before is not None:
                before.release()
            self._handles = [
                model.register_state_dict_post_hook(_store),
                model.register_load_state_dict_pre_hook(_restore),
                model.register_load_state_dict_post_hook(_attach_again),
                model.register_forward_pre_hook(_guard),
            ]
            self.model = model
            model.__dict__[PLAN_ATTRIBUTE] = self  # not by setattr: a module would look for parameters in it
        self.track()
        return self

    def track(self) -> None:
        """Track the inputs of layers whose radii depend on them, and stop tracking those that no longer need it."""
        model = self._require_model()
        wanted = {name: layer for e in self.constrained if e.statistics for name, layer in layers_of(model, e).items()}
        self._untrack(self._tracked - set(wanted))
        for name, layer in wanted.items():
            if not is_tracked(layer):
                track(layer)
                self._tracked.add(name)

    def release(self) -> None:
        """Remove the plan, its hooks and its tracking from the model."""
        model = self._require_model()
        for handle in self._handles:
            handle.remove()
        self._untrack(self._tracked)
        del model.__dict__[PLAN_ATTRIBUTE]
        self.model, self._handles = None, []

    def _untrack(self, names: set[str]) -> None:
        for name, layer in self._require_model().named_modules():
            if name in names and is_tracked(layer):  # otherwise the layer has been replaced
                untrack(layer)
        self._tracked = self._tracked - names


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model, or of the model inside a wrapper (DistributedDataParallel, AveragedModel, compiled model).

    Args:
        model: A constrained model.

    Raises:
        ValueError: If the model has no plan, as with weights that were declared on manifolds by hand.
    """
    if plans := plans_of(model):
        return plans[0]
    declared = [name for name, p in model.named_parameters() if isinstance(p, geoopt.ManifoldParameter)]
    if declared:
        raise ValueError(
            f"this model has no plan: {len(declared)} parameter(s) were put on manifolds without fgo_geo.constrain: "
            f"{few(declared)}. To project them under `with torch.no_grad():`, call `p.proj_()` for every "
            "geoopt.ManifoldParameter p in model.parameters()"
        )
    raise ValueError("this model is not constrained: call fgo_geo.constrain(model) first")


def plans_of(model: nn.Module) -> list[Plan]:
    """The plans of a model and of its parts."""
    return [module.__dict__[PLAN_ATTRIBUTE] for module in model.modules() if PLAN_ATTRIBUTE in module.__dict__]


def _constrained_in(model: nn.Module) -> tuple[PlanEntry, ...]:
    before: Plan | None = model.__dict__.get(PLAN_ATTRIBUTE)
    return () if before is None else before.constrained


# -- hooks: functions of the module, so that models can be copied and pickled -----------------------------------


def _store(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Put the plan into the metadata of a state_dict."""
    local_metadata[_METADATA] = module.__dict__[PLAN_ATTRIBUTE].to_json()


def _restore(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *others: Any) -> None:
    """Adopt the plan of a checkpoint, after rejecting values that are off its manifolds."""
    plan: Plan = module.__dict__[PLAN_ATTRIBUTE]
    plan.before_load(state_dict, prefix, local_metadata)


def _attach_again(module: nn.Module, incompatible_keys: Any) -> None:
    """Attach again after load_state_dict, which turns the parameters that it assigns into plain ones."""
    module.__dict__[PLAN_ATTRIBUTE].after_load()


def _guard(module: nn.Module, inputs: Any) -> None:
    """Refuse to compute with a constrained parameter that has become a plain one."""
    if not torch.compiler.is_compiling():
        plan: Plan = module.__dict__[PLAN_ATTRIBUTE]
        plan.require_kept()
        plan.check_training()
        check_replicas(module, plan.entries)
        if plan.watches:
            plan.__dict__.setdefault("watch", Watch()).before_pass(module, plan.entries)


# -- state dicts ----------------------------------------------------------------------------------------------


def _stored_entries(text: object) -> tuple[PlanEntry, ...]:
    try:
        return Plan.from_json(cast(str, text)).entries
    except ValueError as error:
        raise ValueError(f"the plan in the metadata of the state_dict cannot be read: {error}") from error
