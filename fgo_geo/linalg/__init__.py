"""Batched tensor algebra: the matrix functions that the manifolds are built from.

Nothing here depends on a manifold. All functions act on the last two dimensions and batch over the rest. The rest of
the package imports them from here; the first line of each module says what it holds.
"""

from fgo_geo.linalg.closed_forms import has_closed_form, spectral_norm_3
from fgo_geo.linalg.factors import matrix_exponential, polar_factor, polar_factor_and_range, qr_factor
from fgo_geo.linalg.memory import Memory
from fgo_geo.linalg.newton_schulz import inverse_root_gap, newton_schulz_schedule, polish, refine_gap
from fgo_geo.linalg.precision import (
    at_least_single,
    computes_in_float32,
    in_double,
    lowers_products,
    require_real,
    takes_full_products,
    takes_real_tensors,
)
from fgo_geo.linalg.products import (
    frobenius_norm,
    gram_blocks,
    gram_excess,
    gram_matrix,
    inner_sum,
    root_of_sum,
    root_or_zero,
    skew,
    small_product,
    subtract_part,
    subtract_product,
    sym,
)
from fgo_geo.linalg.shards import Cut, cut_of, is_sharded, local_part, processes_of, whole, write_whole
from fgo_geo.linalg.smooth import arctangent, cosine, sinc
from fgo_geo.linalg.spectral import gram_iteration_bound, largest_eigenvalue, short_side_gram
from fgo_geo.linalg.values import DAMAGED, reads_for_free, require_finite, traces
from fgo_geo.linalg.workspace import Use, Workspace

__all__ = [
    "DAMAGED",
    "Cut",
    "Memory",
    "Use",
    "Workspace",
    "arctangent",
    "at_least_single",
    "computes_in_float32",
    "cosine",
    "cut_of",
    "frobenius_norm",
    "gram_blocks",
    "gram_excess",
    "gram_iteration_bound",
    "gram_matrix",
    "has_closed_form",
    "in_double",
    "inner_sum",
    "inverse_root_gap",
    "is_sharded",
    "largest_eigenvalue",
    "local_part",
    "lowers_products",
    "matrix_exponential",
    "newton_schulz_schedule",
    "polar_factor",
    "polar_factor_and_range",
    "polish",
    "processes_of",
    "qr_factor",
    "reads_for_free",
    "refine_gap",
    "require_finite",
    "require_real",
    "root_of_sum",
    "root_or_zero",
    "short_side_gram",
    "sinc",
    "skew",
    "small_product",
    "spectral_norm_3",
    "subtract_part",
    "subtract_product",
    "sym",
    "takes_full_products",
    "takes_real_tensors",
    "traces",
    "whole",
    "write_whole",
]
