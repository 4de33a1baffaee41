"""The manifold kinds: one record each, and the only list of them.

A *kind* names what the components ``A x B`` of a weight can live on: ``"sphere"``, ``"oblique"``, ``"stiefel"``,
``"euclidean"``, and whatever a user adds. All that other modules have to know of a kind is in its :class:`Kind`: how to
build its manifold, which norms its points have, its colour, and by which number the fused sweeps know it.

No manifold is imported here. The modules of the manifolds enter their own records, and users enter theirs with
:func:`register_kind`. Groups, norms, radii, plans, reports and execution paths look kinds up by name (:func:`kind`) or
by class (:func:`kind_of`). A path that does not know a kind leaves it to the reference path.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import geoopt
import torch
from torch import Tensor

__all__ = ["Kind", "kind", "kind_of", "kinds", "names", "register", "register_kind", "unregister_kind"]

Radius: TypeAlias = float | Tensor

_SPARE_COLOURS = ("#cc79a7", "#0072b2", "#d55e00", "#f0e442")  # of Okabe and Ito's palette, as the other kinds' are


@dataclass(frozen=True, eq=False)
class Kind:
    """What is known of a manifold kind.

    Attributes:
        name: Its name, in small letters.
        manifold: Its class. A class derived from it is not of this kind.
        build: The manifold of given radius (a number, or a tensor with one per component) over the last two dimensions.
        norms: From ``(A, B)``, upper bounds of the Frobenius and the spectral norm at radius one; None if its points
            have no such bounds.
        carry: ``carry(x, source, target)``: the nearest points of radius ``source``, multiplied by ``target / source``,
            with radii of shape ``(n, 1, 1)``. It is differentiable and does not check ``x``. None without ``norms``.
        colour: Colour in plots.
        code: The number by which the fused sweeps know it; None if no fused sweep does.
        options: Attributes, besides the radius and ``ndim``, in which two manifolds of this kind can differ.
        joins_filters: Whether all filters of a group are one component, one column each, where components are filters;
            else every filter is a component.
        aliases: Other words for it.
    """

    name: str
    manifold: type[geoopt.Manifold]
    build: Callable[[Radius], geoopt.Manifold]
    norms: Callable[[int, int], tuple[float, float]] | None
    carry: Callable[[Tensor, Radius, Radius], Tensor] | None
    colour: str
    code: int | None = None
    options: tuple[str, ...] = ()
    joins_filters: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def has_radius(self) -> bool:
        """Whether its manifolds come in all radii."""
        return hasattr(self.manifold, "radius_for")

    def typical_norm(self, rows: int, columns: int) -> float:
        """Frobenius norm at radius one: the bound, or without one the root mean square of 256 projected random points.

        Args:
            rows: ``A``.
            columns: ``B``.

        Returns:
            A number.
        """
        if self.norms is not None:
            return self.norms(rows, columns)[0]
        generator = torch.Generator().manual_seed(0)
        points = self.build(1.0).projx(torch.randn(256, rows, columns, dtype=torch.float64, generator=generator))
        return math.sqrt(float(points.square().sum()) / len(points))


_kinds: dict[str, Kind] = {}
_by_word: dict[str, Kind] = {}
_by_class: dict[type, Kind] = {}
_of_users: set[str] = set()


def kinds() -> tuple[Kind, ...]:
    """All kinds, in the order of registration."""
    return tuple(_kinds.values())


def names() -> tuple[str, ...]:
    """The names of all kinds, in the order of registration.

    Example:
        >>> names()[:4]
        ('sphere', 'oblique', 'stiefel', 'euclidean')
    """
    return tuple(_kinds)


def kind(word: object) -> Kind:
    """The kind with a name.

    Args:
        word: A name or an alias, in any case of letters.

    Returns:
        The record.

    Raises:
        ValueError: If there is none.

    Example:
        >>> kind("ST").name
        'stiefel'
    """
    found = _by_word.get(word.casefold()) if isinstance(word, str) else None
    if found is None:
        raise ValueError(
            f"a manifold kind must be one of {names()}, got {word!r}; a kind of your own is added by "
            "fgo_geo.register_kind"
        )
    return found


def kind_of(manifold: geoopt.Manifold | type) -> Kind | None:
    """The kind of a manifold or of its class; None for other classes, those derived from a registered one included.

    Example:
        >>> kind_of(geoopt.Euclidean(ndim=2)).name
        'euclidean'
        >>> class Own(geoopt.Euclidean): ...
        >>> kind_of(Own) is None
        True
    """
    return _by_class.get(manifold if isinstance(manifold, type) else type(manifold))


def register(record: Kind) -> None:
    """Enter a record.

    Args:
        record: A kind.

    Raises:
        ValueError: If its name, one of its aliases or its class is taken.
    """
    for word in (record.name, *record.aliases):
        if word in _by_word:
            raise ValueError(
                f"register_kind: {word!r} names the kind of {_by_word[word].manifold.__name__} already; choose another "
                f"name, or call fgo_geo.weights.kinds.unregister_kind({word!r}) first"
            )
    if record.manifold in _by_class:
        raise ValueError(
            f"register_kind: {record.manifold.__name__} is the class of the kind {_by_class[record.manifold].name!r} "
            "already; register a class derived from it"
        )
    _kinds[record.name] = _by_class[record.manifold] = record
    _by_word.update(dict.fromkeys((record.name, *record.aliases), record))


def unregister_kind(name: str) -> None:
    """Take a kind out that was added by :func:`register_kind`. Weights that are on its manifold already stay there.

    Args:
        name: Its name.

    Raises:
        ValueError: If there is no such kind, or the package has it.
    """
    record = kind(name)
    if record.name not in _of_users:
        raise ValueError(f"unregister_kind: {record.name!r} is a kind of the package, which needs it")
    _of_users.remove(record.name)
    del _kinds[record.name], _by_class[record.manifold]
    for word in (record.name, *record.aliases):
        del _by_word[word]


def register_kind(
    name: str,
    manifold: type[geoopt.Manifold],
    *,
    build: Callable[[Radius], geoopt.Manifold] | None = None,
    norms: Callable[[int, int], tuple[float, float]] | None = None,
    colour: str | None = None,
    options: tuple[str, ...] = (),
    joins_filters: bool = False,
) -> Kind:
    """Add a manifold kind of your own: groups, plans, radii, reports and the optimiser then know it by its name.

    Weights of the kind take the reference path of a step. To load a plan or a checkpoint that names the kind, register
    it first. The guide "Your own manifold" has an example.

    Args:
        name: Its name: small letters, digits and underscores.
        manifold: A class derived from :class:`~fgo_geo.manifolds.ComponentManifold` with ``ndim = 2``.
        build: Makes a manifold of a given radius; ``manifold(radius=radius)`` if left out.
        norms: From the rows and columns of a component (``rows >= columns``), upper bounds of its Frobenius and its
            spectral norm at radius one. Without it the kind cannot be used where norms are bounded (``radius="bound"``
            and :func:`~fgo_geo.renormalize`), and ``radius="kaiming"`` measures the norm of random points.
        colour: Its colour in plots; one that is not in use if left out.
        options: Names of attributes, besides the radius, in which two manifolds of the class can differ. Components of
            several layers are computed together where these are equal.
        joins_filters: With ``components="filter"``, whether the filters of a group are the columns of one component,
            as on the Stiefel manifold. By default every filter is a component.

    Returns:
        The record.

    Raises:
        TypeError: If the class is not one of a manifold, or lacks something.
        ValueError: If the name has another form, the name or the class is taken, or ``norms`` returns something else.

    Example:
        >>> import fgo_geo
        >>> class TiltedSphere(fgo_geo.Oblique):
        ...     name = "TiltedSphere"
        >>> record = register_kind("tilted", TiltedSphere)
        >>> fgo_geo.collection(4, 4, "layer", "tilted").groups[0].manifold
        'tilted'
        >>> unregister_kind("tilted")
    """
    if not isinstance(name, str) or re.fullmatch("[a-z][a-z0-9_]*", name) is None:
        raise ValueError(f"register_kind: name must be small letters, digits and underscores, got {name!r}")
    if not (isinstance(manifold, type) and issubclass(manifold, geoopt.Manifold)):
        raise TypeError(f"register_kind: {name!r} needs a class derived from geoopt.Manifold, got {manifold!r}")
    lacking: list[str] = sorted(getattr(manifold, "__abstractmethods__", ()))
    if getattr(manifold, "name", None) is None:
        lacking.append("a name")
    if not hasattr(manifold, "radius_for"):
        lacking.append("a radius (derive it from fgo_geo.manifolds.ComponentManifold)")
    if lacking:
        raise TypeError(f"register_kind: {manifold.__name__} cannot be a kind, it lacks {', '.join(lacking)}")
    build = _builder(manifold) if build is None else build
    unit = build(1.0)
    if type(unit) is not manifold or unit.ndim != 2:
        raise TypeError(
            f"register_kind: a component is a matrix, so {name!r} needs a {manifold.__name__} with ndim = 2, got "
            f"{type(unit).__name__} with ndim = {unit.ndim}"
        )
    _check_norms(name, norms)
    free = [spare for spare in _SPARE_COLOURS if all(k.colour != spare for k in kinds())]

    def carry(x: Tensor, source: Radius, target: Radius) -> Tensor:
        return unit.projx(x / source) * target

    record = Kind(
        name,
        manifold,
        build,
        norms,
        None if norms is None else carry,
        colour or (free or _SPARE_COLOURS)[0],
        options=tuple(options),
        joins_filters=joins_filters,
    )
    register(record)
    _of_users.add(name)
    return record


def _builder(manifold: Any) -> Callable[[Radius], geoopt.Manifold]:
    arguments = {"ndim": 2} if "ndim" in inspect.signature(manifold).parameters else {}

    def build(radius: Radius) -> geoopt.Manifold:
        return manifold(radius=radius, **arguments)

    return build


def _check_norms(name: str, norms: Callable[[int, int], tuple[float, float]] | None) -> None:
    """Raise ValueError if ``norms`` does not return two positive numbers."""
    found: Any = (1.0, 1.0) if norms is None else norms(3, 2)
    if not (isinstance(found, tuple) and len(found) == 2 and all(0 < float(number) < math.inf for number in found)):
        raise ValueError(
            f"register_kind: norms of {name!r} must return two positive numbers, bounds of the Frobenius and the "
            f"spectral norm at radius one, got {found!r} for a 3 x 2 component"
        )
