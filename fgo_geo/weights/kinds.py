"""The manifold kinds: one record each, and the only list of them.

A *kind* names a manifold for the components ``A x B`` of a weight: ``"sphere"``, ``"oblique"``, ``"stiefel"``,
``"euclidean"``, and kinds that users add. Its :class:`Kind` holds everything that other modules need to know: how to
build its manifold, which norms its points have, its colour, and its number in the fused sweeps.

This module imports no manifold. The modules of the manifolds register their own records, and users register theirs with
:func:`register_kind`. Groups, norms, radii, plans, reports and execution paths look kinds up by name (:func:`kind`) or
by class (:func:`kind_of`). A path that does not know a kind leaves it to the reference path.

A manifold object names a kind, too: that of its class, which is registered on first use. Classes of Geoopt have
the names ``"geoopt.CanonicalStiefel"`` and so on, and can be looked up by them at any time.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import geoopt
import torch
from torch import Tensor

from fgo_geo.linalg import Memory, traces
from fgo_geo.weights.kind_checks import check_methods, drawn, tensors_of
from fgo_geo.weights.words import did_you_mean

__all__ = [
    "Kind",
    "KindLike",
    "UnregisteredKindError",
    "find",
    "kind",
    "kind_of",
    "kinds",
    "names",
    "register",
    "register_kind",
    "unregister_kind",
]

Radius: TypeAlias = float | Tensor
KindLike: TypeAlias = str | geoopt.Manifold

_SPARE_COLOURS = ("#cc79a7", "#0072b2", "#d55e00", "#f0e442")  # of Okabe and Ito's palette, as the other kinds' are


class UnregisteredKindError(ValueError):
    """A text names a kind that is not registered: the text is valid, but the kind has to be registered first."""


@dataclass(frozen=True, eq=False, repr=False)
class Kind:
    """The properties of a manifold kind.

    Attributes:
        name: Its name, in small letters.
        manifold: Its class. A class derived from it is not of this kind.
        build: The manifold of given radius (a number, or a tensor with one per component) over the last two dimensions.
        norms: From ``(A, B)``, upper bounds of the Frobenius and the spectral norm at radius one; None if its points
            have no such bounds.
        carry: ``carry(x, source, target, memory)``: a projection onto the points of radius ``source``, multiplied by
            ``target / source``, with radii of shape ``(n, 1, 1)``. It is differentiable and does not check ``x``; a
            decomposition of NaN may raise. It may keep a decomposition of the last ``x`` in ``memory``. None without
            ``norms`` or without a radius.
        colour: Colour in plots.
        code: Its number in the fused sweeps; None if they do not support it.
        is_decomposed: Whether its operations take products or decompositions of whole components, so that they cost
            much more than sums over the entries.
        options: Attributes, besides the radius and ``ndim``, in which two manifolds of this kind can differ.
        joins_filters: With filters as components, whether all filters of a group form one component, with one column
            each. Otherwise every filter is a component.
        aliases: Other words for it.
        checked: The sizes on which :meth:`check_methods` has found nothing wrong.
    """

    name: str
    manifold: type[geoopt.Manifold]
    build: Callable[[Radius], geoopt.Manifold]
    norms: Callable[[int, int], tuple[float, float]] | None
    carry: Callable[[Tensor, Radius, Radius, Memory | None], Tensor] | None
    colour: str
    code: int | None = None
    is_decomposed: bool = True
    options: tuple[str, ...] = ()
    joins_filters: bool = False
    aliases: tuple[str, ...] = ()
    checked: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])

    def __repr__(self) -> str:
        """Its name and its class, in one line."""
        return f"<Kind {self.name!r}: {self.manifold.__name__}>"

    @property
    def is_free(self) -> bool:
        """Whether its components are not constrained at all."""
        return self.manifold is geoopt.Euclidean

    @property
    def is_of_user(self) -> bool:
        """Whether a user registered it. Geoopt's classes count as registered, except ``Euclidean``."""
        return self.name in _of_users

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

        Raises:
            TypeError: As :meth:`check_methods`.
        """
        self.check_methods(rows, columns)
        if self.norms is not None:
            return self.norms(rows, columns)[0]
        unit = self.build(1.0)
        squares = (unit.projx(batch).detach().double().square().sum() for batch in drawn(unit, 256, rows, columns))
        return math.sqrt(sum(map(float, squares)) / 256)

    def check_methods(self, rows: int, columns: int) -> None:
        """Check the methods of a user's class, once for each size of components.

        Args:
            rows: ``A``.
            columns: ``B``.

        Raises:
            TypeError: As :func:`~fgo_geo.weights.kind_checks.check_methods`.
        """
        size = (rows, columns)
        if not self.is_of_user or self.manifold.__module__.startswith("geoopt.") or size in self.checked:
            return
        unit: Any = self.build(1.0)
        if not traces() and unit._check_shape((3, *size), "x")[0]:
            check_methods(self.name, unit, self.norms, *size)
            self.checked.add(size)


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
        >>> names()[:3]
        ('sphere', 'oblique', 'stiefel')
    """
    return tuple(_kinds)


def find(word: object) -> Kind | None:
    """The kind with a name or an alias, in upper or lower case; None if there is none.

    ``"geoopt."`` and the name of a class of Geoopt finds that class, if it is a manifold of matrices.

    Example:
        >>> find("geoopt.EuclideanStiefel").name
        'geoopt.EuclideanStiefel'
        >>> find("cube") is None
        True
    """
    if not isinstance(word, str):
        return None
    word = word.casefold()
    module, _, name = word.partition(".")
    if word not in _by_word and module == "geoopt":
        own = next((own for known, own in vars(geoopt).items() if known.casefold() == name), None)
        if isinstance(own, type) and issubclass(own, geoopt.Manifold) and own.ndim == 2:
            return kind(cast(Any, own)())
    return _by_word.get(word)


def kind(word: object) -> Kind:
    """The kind that a name or a manifold stands for.

    Args:
        word: A name or an alias, in upper or lower case; or a manifold of components, of radius one if it has a radius.

    Returns:
        The record. If the class of a manifold is not registered yet, this function registers it, as
        ``"geoopt.CanonicalStiefel"`` or, if it is not Geoopt's, as ``"special_orthogonal"`` for a class
        ``SpecialOrthogonal``.

    Raises:
        ValueError: If there is no such kind; or the manifold has another radius than one, or other options than the
            registered ones of its class.
        TypeError: If the manifold is not a manifold of components.

    Example:
        >>> kind("ST").name, kind(geoopt.CanonicalStiefel()).name
        ('stiefel', 'geoopt.CanonicalStiefel')
    """
    if isinstance(word, geoopt.Manifold):
        return _kind_of_object(word)
    found = find(word)
    if found is None:
        raise ValueError(f"a manifold kind must be one of {names()}, got {word!r}{_remedy(word)}")
    return found


def _remedy(word: object) -> str:
    """What to write in place of a word that names no kind."""
    if isinstance(word, type) and issubclass(word, geoopt.Manifold):
        return f"; pass an object, {word.__name__}()"
    several = re.findall(r"[\w.]+", word) if isinstance(word, str) else []
    if len(several) > 1:
        return f"; pass several kinds as a tuple, {tuple(several)}"
    return did_you_mean(word, _by_word) or "; fgo_geo.register_kind adds a kind of your own"


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
    words = [word.casefold() for word in (record.name, *record.aliases)]
    for word in words:
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
    _by_word.update(dict.fromkeys(words, record))


def unregister_kind(name: str) -> None:
    """Remove a kind that :func:`register_kind` has added. Weights that are on its manifold already stay there.

    Args:
        name: Its name.

    Raises:
        ValueError: If there is no such kind, or the package itself provides it.
    """
    record = kind(name)
    if record.name not in _of_users:
        raise ValueError(f"unregister_kind: {record.name!r} is a kind of the package, which needs it")
    _of_users.remove(record.name)
    del _kinds[record.name], _by_class[record.manifold]
    for word in (record.name, *record.aliases):
        del _by_word[word.casefold()]


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
    """Add a custom manifold kind, which groups, plans, radii, reports and the optimiser then accept by its name.

    Weights of the kind take the reference path of a step. To load a plan or a checkpoint that names the kind, register
    it first. The guide "Your own manifold" has an example.

    Args:
        name: Its name: small letters, digits and underscores.
        manifold: A class derived from :class:`~fgo_geo.manifolds.ComponentManifold` with ``ndim = 2``. Any other
            manifold of Geoopt with two dimensions works as well, but has no radius: rules for radii leave it unchanged.
        build: A function that creates a manifold of a given radius; ``manifold(radius=radius)`` if left out, or
            ``manifold()`` for a class without radius.
        norms: A function from the rows and columns of a component (``rows >= columns``) to upper bounds of its
            Frobenius and its spectral norm at radius one. Without it, ``radius="bound"`` and
            :func:`~fgo_geo.renormalize` raise an error for this kind, and ``radius="kaiming"`` measures the norm of
            random points.
        colour: Its colour in plots; by default a colour that is not in use.
        options: Names of attributes, besides the radius, in which two manifolds of the class can differ. The optimiser
            computes components of several layers together if these attributes are equal.
        joins_filters: With ``components="filter"``, whether the filters of a group are the columns of one component,
            as on the Stiefel manifold. By default every filter is a component.

    Returns:
        The record.

    Raises:
        TypeError: If the class is not a manifold class, or lacks a method or attribute.
        ValueError: If the name has another form, the name or the class is taken, or ``norms`` returns anything but two
            positive numbers.

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
    return _enter(name, manifold, build, norms, colour, options, joins_filters)


def _enter(
    name: str,
    manifold: Any,
    build: Callable[[Radius], geoopt.Manifold] | None,
    norms: Callable[[int, int], tuple[float, float]] | None,
    colour: str | None = None,
    options: Sequence[str] = (),
    joins_filters: bool = False,
) -> Kind:
    """Enter the record of a class that is not the package's own, after checking the class."""
    if not (isinstance(manifold, type) and issubclass(manifold, geoopt.Manifold)):
        raise TypeError(f"register_kind: {name!r} needs a class derived from geoopt.Manifold, got {manifold!r}")
    lacking: list[str] = sorted(getattr(manifold, "__abstractmethods__", ()))
    if getattr(manifold, "name", None) is None:
        lacking.append("a name")
    if lacking:
        raise TypeError(f"register_kind: {manifold.__name__} cannot be a kind: it lacks {', '.join(lacking)}")
    build = _builder(manifold) if build is None else build
    unit = build(1.0)
    if type(unit) is not manifold or unit.ndim != 2:
        raise TypeError(
            f"register_kind: a component is a matrix, so {name!r} needs a {manifold.__name__} with ndim = 2, got "
            f"{type(unit).__name__} with ndim = {unit.ndim}"
        )
    if issubclass(manifold, (geoopt.UpperHalf, geoopt.BoundedDomain)):
        raise TypeError(
            f"register_kind: {manifold.__name__} cannot be a kind: its points are complex, and components of weights "
            "are real; use a manifold of real matrices"
        )
    if any(held.is_meta for held in tensors_of(unit)):
        raise TypeError(
            f"register_kind: {manifold.__name__} cannot be a kind: it holds a tensor on the meta device, which has no "
            "values; make its tensors on the CPU, and register it outside of `with torch.device('meta')`"
        )
    _check_norms(name, norms)
    free = [spare for spare in _SPARE_COLOURS if all(k.colour != spare for k in kinds())]

    def carry(x: Tensor, source: Radius, target: Radius, memory: Memory | None) -> Tensor:
        return unit.projx(x / source) * target

    record = Kind(
        name,
        manifold,
        build,
        norms,
        carry if norms is not None and hasattr(manifold, "radius_for") else None,
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
        return manifold(radius=radius, **arguments) if hasattr(manifold, "radius_for") else manifold(**arguments)

    return build


def _check_norms(name: str, norms: Callable[[int, int], tuple[float, float]] | None) -> None:
    """Raise ValueError if ``norms`` does not return two positive numbers."""
    found: Any = (1.0, 1.0) if norms is None else norms(3, 2)
    if not (isinstance(found, tuple) and len(found) == 2 and all(0 < float(number) < math.inf for number in found)):
        raise ValueError(
            f"register_kind: norms of {name!r} must return two positive numbers, bounds of the Frobenius and the "
            f"spectral norm at radius one, got {found!r} for a 3 x 2 component"
        )


# -- manifolds as names ------------------------------------------------------------------------------------------


def _kind_of_object(manifold: geoopt.Manifold) -> Kind:
    """The kind of a manifold's class, registered if it has not been; see :func:`kind`."""
    own: Any = type(manifold)
    shown = f"{own.__name__}, given as a manifold kind,"
    if isinstance(manifold, (geoopt.Scaled, geoopt.ProductManifold)):
        raise TypeError(f"{shown} stands for other manifolds; pass the manifold of one component")
    if hasattr(manifold, "radius_for") and not _equal(manifold.radius, 1.0):
        raise ValueError(
            f"{shown} has radius {manifold.radius!r}; the argument radius sets radii, so pass a manifold of radius 1"
        )
    record = kind_of(manifold)
    if record is None:
        name = f"geoopt.{own.__name__}" if getattr(geoopt, own.__name__, None) is own else _snake_case(own.__name__)
        if name.casefold() in _by_word:
            raise ValueError(
                f"{shown} would be called {name!r}, which is the name of another kind; register its class under "
                "another name with fgo_geo.register_kind"
            )
        settings = _settings(manifold)
        tensors = [key for key, value in settings.items() if isinstance(value, (Tensor, torch.nn.Module))]
        if tensors:
            raise TypeError(
                f"{shown} holds {tensors[0]!r}; register its class with fgo_geo.register_kind, and pass build="
            )
        template = copy.deepcopy(manifold)

        def build(radius: Radius) -> geoopt.Manifold:
            made: Any = copy.deepcopy(template)
            if hasattr(own, "radius_for"):
                made.radius = radius
            return made

        orthonormal = issubclass(own, geoopt.Stiefel)
        record = _enter(
            name,
            own,
            build,
            (lambda rows, columns: (math.sqrt(columns), 1.0)) if orthonormal else None,
            options=tuple(settings),
            joins_filters=orthonormal
            or any(_by_class[base].joins_filters for base in own.__mro__ if base in _by_class),
        )
    expected = record.build(1.0)
    differing = [name for name in record.options if not _equal(getattr(manifold, name), getattr(expected, name))]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{shown} has {name}={getattr(manifold, name)!r}, but the kind {record.name!r} of that class has "
            f"{name}={getattr(expected, name)!r}; derive a class of your own and call fgo_geo.register_kind"
        )
    return record


def _settings(manifold: geoopt.Manifold) -> dict[str, Any]:
    """What a manifold was made with, by attribute, besides its radius."""
    stored: dict[str, Any] = {**vars(manifold), **dict(manifold.named_buffers()), **dict(manifold.named_children())}
    return {
        name: value for name, value in stored.items() if name[0] != "_" and name not in ("training", "radius", "ndim")
    }


def _equal(one: object, other: object) -> bool:
    return type(one) is type(other) and bool(one == other)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).casefold().strip("_")
