"""Operators: what a metric G is, as a small frozen pytree that shows its structure.

Vectors are pytrees with the structure of the parameters; an operator that is built by hand on arrays acts on flat
vectors. Every operator G has

    space                 structure, shapes and dtypes of its vectors
    mv(v)                 Gv, with the dtypes of v;   product(): the same map, prepared once for many vectors
    inner(u, v)           Re uᴴGv;   norm(v): √(vᴴGv), for v of any size
    dense()               the (p, p) matrix;   diagonal(): shaped like the parameters;   trace()
    scale()               √G_ii as a flat vector;   balanced(): the matrix, in a frame where it stays within the floats
    max_rank()            an upper bound on the rank, from shapes alone
    restrict(mask)        the block of the leaves in `mask`

`add` and `scale` make sums and positive multiples; `report` tells a person what an operator is like.
"""

from natgrad_jax._tree import Space
from natgrad_jax.operators.algebra import add, scale
from natgrad_jax.operators.arrays import Dense, Diagonal, Gram, LowRank
from natgrad_jax.operators.outer import Outer
from natgrad_jax.operators.picked import Picked
from natgrad_jax.operators.pieces import Pieces
from natgrad_jax.operators.products import Closed, Implicit, RealParts, Restricted, Sum
from natgrad_jax.operators.reports import Report, report
from natgrad_jax.operators.shared import Operator, is_operator
from natgrad_jax.operators.structured import Blocks, Kronecker

__all__ = [
    "Blocks",
    "Closed",
    "Dense",
    "Diagonal",
    "Gram",
    "Implicit",
    "Kronecker",
    "LowRank",
    "Operator",
    "Outer",
    "Picked",
    "Pieces",
    "RealParts",
    "Report",
    "Restricted",
    "Space",
    "Sum",
    "add",
    "is_operator",
    "report",
    "scale",
]
