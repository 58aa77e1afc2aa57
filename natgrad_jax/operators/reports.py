"""What an operator is like, for a person to read."""

from typing import Any, NamedTuple

import jax
import numpy as np

from natgrad_jax._tree import PyTree, Space, concrete, real_parts
from natgrad_jax.operators.products import RealParts
from natgrad_jax.operators.shared import Operator, is_operator

LARGEST = 4096  # parameters: beyond, an eigendecomposition takes minutes
SHOWN = 8  # null directions, and coordinates of each, that are printed


class Report(NamedTuple):
    """Of an operator G and a gradient g, in the units in which G has a unit diagonal.

    Attributes:
        size: number of parameters p, in real numbers.
        rank: eigenvalues above p·eps of the largest.
        condition: of G on its range, in these units: what a solver that scales sees.
        raw_condition: of G as it stands, units included.
        dead: paths of the parameters without any curvature.
        null_directions: for each direction without curvature {path of a parameter: its share in the parameters' units},
            the largest being 1; in echelon form, so that each has a parameter that no other has.
        norm: √(gᵀG⁺g), the natural norm of g; None without a gradient.
        outside: the part of g outside the range of G, in [0, 1]; None without a gradient.
        explained: R² = gᵀG⁺g / Var f for a g = ∇E[f]; None without a variance.
    """

    size: int
    rank: int
    condition: float
    raw_condition: float
    dead: list[str]
    null_directions: list[dict[str, Any]]
    norm: float | None
    outside: float | None
    explained: float | None

    def __str__(self) -> str:
        lines = [
            f"{self.size} parameters, rank {self.rank}",
            f"condition {self.condition:.3g} with a unit diagonal, {self.raw_condition:.3g} in the units as they are",
        ]
        if self.dead:
            lines.append(f"without curvature: {_some(self.dead)}")
        for direction in self.null_directions[:SHOWN]:
            terms = [f"{share:+.3g} {path}" for path, share in direction.items()]
            lines.append(f"null direction: {_some(terms, ' ')}")
        if len(self.null_directions) > SHOWN:
            lines.append(f"… and {len(self.null_directions) - SHOWN} more null directions")
        if self.norm is not None:
            lines.append(f"gradient: natural norm {self.norm:.4g}, part outside the range {self.outside:.3g}")
        if self.explained is not None:
            lines.append(f"R² = {self.explained:.4g} of the variance is explained by the scores")
        return "\n".join(lines)


def report(operator: Operator, gradient: PyTree = None, *, variance: Any = None) -> Report:
    """Rank, condition and null directions of a metric, and how much of a gradient it reaches; for a person to read.

    Args:
        operator: G, what a metric returned; up to 4096 parameters, outside `jit`.
        gradient: g, a vector of the operator's space, or None.
        variance: Var_q f for the g of E_q[f] and G the Fisher information; then gᵀG⁺g / Var f is the R² of the
            regression of f on the scores.

    Returns:
        `Report`, whose string is what to print.

    Raises:
        ValueError: more parameters than that, entries of G that are not finite, a gradient of another structure.

    Cost: O(p³), on the host.

    Example:
        >>> import jax.numpy as jnp
        >>> import natgrad_jax as ng
        >>> p = jnp.array([0.5, 0.25, 0.25])
        >>> print(ng.operators.report(ng.operators.Dense(jnp.diag(p) - jnp.outer(p, p))))  # softmax
        3 parameters, rank 2
        condition 1.25 with a unit diagonal, 1.5 in the units as they are
        null direction: +1 [0] +1 [1] +1 [2]
    """
    if isinstance(operator, RealParts):
        return report(operator.parts, None if gradient is None else real_parts(gradient), variance=variance)
    if not is_operator(operator):
        raise TypeError(
            f"operator: expected what a metric returns, metric(params, **data), got {type(operator).__name__}"
        )
    space = operator.space
    if space.size > LARGEST:
        raise ValueError(f"operator: expected at most {LARGEST} parameters, got {space.size}; restrict it to a part")
    lengths, matrix = operator.balanced()
    if not concrete(matrix):
        raise TypeError("operator: a report is for people, and reads numbers; call it outside of jit, vmap and grad")
    balanced = np.asarray(matrix)
    if not np.isfinite(balanced).all():
        raise ValueError("operator: expected finite entries, got some that are not; check the parameters and the data")
    cut = max(space.size, 1) * float(np.finfo(balanced.dtype).eps)
    balanced = balanced.astype(np.complex128 if np.iscomplexobj(balanced) else np.float64)
    frame = np.ones(space.size) if lengths is None else np.asarray(lengths, np.float64)
    root = np.sqrt(np.maximum(np.diagonal(balanced).real, 0))
    alive, inverse, scale, names = root > 0, _inverse(root), frame * root, paths(space)
    values, vectors = np.linalg.eigh(balanced * inverse[:, None] * inverse)
    kept = values > cut * values.max(initial=0)
    null = _echelon(vectors[:, ~kept & _touches(vectors, alive)].T, alive)
    norm = outside = explained = None
    if gradient is not None:
        space.check(gradient, "gradient")
        norm, outside = _reach(np.asarray(space.ravel(gradient)), scale, vectors[:, kept], values[kept])
        explained = None if variance is None else norm**2 / float(variance) if variance > 0 else float("nan")
    return Report(
        size=space.size,
        rank=int(kept.sum()),
        condition=_condition(values[kept]),
        raw_condition=_condition(_raw_values(balanced, frame, cut)),
        dead=[name for name, lives in zip(names, alive, strict=True) if not lives],
        null_directions=[_by_path(row, scale, names) for row in null],
        norm=norm,
        outside=outside,
        explained=explained,
    )


def _reach(gradient: np.ndarray, scale: np.ndarray, vectors: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """√(gᵀG⁺g), and the share of g outside of the range; 1 if g has a part where there is no curvature at all."""
    covector = _inverse(scale) * gradient
    reached = vectors.conj().T @ covector
    lost, given = np.linalg.norm(covector - vectors @ reached), np.linalg.norm(covector)
    beyond = np.any(gradient[scale == 0] != 0)
    return float(np.linalg.norm(reached / np.sqrt(values))), 1.0 if beyond else float(lost / given) if given else 0.0


def paths(space: Space) -> list[str]:
    """The path of every number in a flat vector, such as ['w'][0, 2]."""
    out = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(space.structs()):
        name = jax.tree_util.keystr(path)
        indices = np.ndindex(*leaf.shape) if leaf.shape else [()]
        out += [f"{name}[{', '.join(map(str, index))}]" if index else name or "params" for index in indices]
    return out


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, 1 / np.where(x > 0, x, 1), 0)


def _condition(values: np.ndarray) -> float:
    return float(values.max() / values.min()) if values.size and values.min() > 0 else float("nan")


def _raw_values(balanced: np.ndarray, frame: np.ndarray, cut: float) -> np.ndarray:
    values = np.linalg.eigvalsh(balanced * frame[:, None] * frame)
    return values[values > cut * values.max(initial=0)]


def _touches(vectors: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Which eigenvectors are more than a dead coordinate."""
    return np.linalg.norm(vectors[alive], axis=0) > 0.5


def _echelon(rows: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The reduced echelon form of the rows: each has a 1 where all others have a 0."""
    rows = np.where(alive, rows, 0)
    for i in range(len(rows)):
        column = int(np.argmax(np.abs(rows[i])))
        rows[i] /= rows[i, column]
        others = np.arange(len(rows)) != i
        rows[others] -= np.outer(rows[others, column], rows[i])
    return rows


def _by_path(row: np.ndarray, scale: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The entries that are not rounding, in the units of the parameters."""
    seen = np.flatnonzero(np.abs(row) > 1e-3 * np.abs(row).max(initial=0))
    in_units = row * _inverse(scale)
    largest = in_units[np.argmax(np.abs(in_units))] if len(seen) else 1.0
    order = sorted(seen, key=lambda i: -round(abs(in_units[i] / largest), 6))
    shares = {names[i]: complex(in_units[i] / largest) for i in order}
    return {name: share if share.imag else share.real for name, share in shares.items()}


def _some(items: list[str], separator: str = ", ") -> str:
    shown = separator.join(items[:SHOWN])
    return shown if len(items) <= SHOWN else f"{shown} … ({len(items)} in all)"
