"""Errors for arguments that are mistaken for a model, a plan or a layer."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from fgo_geo.weights.words import few

__all__ = ["NoModel", "require_model", "weights_inside"]

_KEEP_THE_MODEL = (
    "constrain changes the model in place and returns the plan. Keep the model under its own name: write "
    "`plan = constrain(model)` and continue with `model`"
)


class NoModel:
    """Base class of plans: its errors explain the slip ``model = constrain(model)``."""

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raise, because a plan computes nothing.

        Raises:
            TypeError: Always, with the remedy.
        """
        raise TypeError(f"a {type(self).__name__} is not a model and cannot be called: {_KEEP_THE_MODEL}")

    def __getitem__(self, index: object) -> NoReturn:
        """Raise, because a plan has no layers: ``model[0]`` after ``model = constrain(model)``.

        Raises:
            TypeError: Always, with what to write instead.
        """
        raise TypeError(f"a {type(self).__name__} is not a model and has no layers: {_KEEP_THE_MODEL}")

    def __getattr__(self, name: str) -> NoReturn:
        own = type(self).__name__
        if not name.startswith("_") and (hasattr(nn.Module, name) or hasattr(vars(self).get("model"), name)):
            raise AttributeError(f"a {own} is not a model and has no {name!r}: {_KEEP_THE_MODEL}")
        raise AttributeError(f"{own!r} object has no attribute {name!r}")


def require_model(model: object, function: str) -> None:
    """Raise TypeError, with the remedy, if an object is not a module.

    Args:
        model: The object.
        function: Name of the function that received it.
    """
    if isinstance(model, nn.Module):
        return
    remedy = "pass a torch.nn.Module"
    if isinstance(model, Optimizer):
        remedy = f"call {function}(model) first, and build the optimiser from model.named_parameters() after that"
    elif isinstance(model, NoModel):
        remedy = _KEEP_THE_MODEL
    elif isinstance(model, type) and issubclass(model, nn.Module):
        remedy = f"pass an object, {model.__name__}(...)"
    shown = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(f"{function}: expected a model, got {shown}; {remedy}")


def weights_inside(module: nn.Module) -> str:
    """The parameters that a module has itself, or else those of the layers in it."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    inner = [name for name, param in module.named_parameters() if param.ndim > 1]
    if own or not inner:
        return f"this module has {own}"
    layer, _, name = inner[0].rpartition(".")
    return (
        f"its layers have {few(inner)}: call renormalize for one layer at a time, e.g. "
        f"renormalize(model.get_submodule({layer!r}), {name!r})"
    )
