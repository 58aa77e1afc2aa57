"""What holds the house up: one-way imports, public JAX only, and a worked example on every public name."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import natgrad_jax as ng

PACKAGE = Path(ng.__file__).parent

# module -> what it may import from the package. Metrics and solvers never see each other.
ALLOWED = {
    "_tree": set(),
    "constraints": {"_tree"},
    "operators": {"_tree"},
    "damping": {"_tree", "operators"},
    "layers": {"_tree", "operators"},
    "metrics": {"_tree", "operators", "layers"},
    "solvers": {"_tree", "operators", "damping"},
    "families": {"_tree", "operators"},
    "transforms": {"_tree", "operators", "damping", "metrics", "solvers", "families"},
    "inference": {"_tree", "operators", "damping", "metrics", "solvers", "families", "transforms"},
    "adapters": {"_tree", "operators", "families", "transforms"},
    "problems": {"_tree", "families"},
}
SHOWROOMS = {"__init__", "__main__", "demo"}
# Shared between modules, not promised to users.
HELPERS = {
    "metrics.check_log_prob", "metrics.check_weights", "metrics.losses.second",
    "damping.as_rule", "damping.at", "damping.checked", "damping.known_scale", "damping.root_mean_square",
    "damping.squares", "operators.is_operator", "solvers.factor", "solvers.implicit",
    "solvers.check_solver", "solvers.damped_product", "layers.rows", "layers.Plan", "layers.BoundRuleError",
}  # fmt: skip
PUBLIC = [
    "adapters", "constraints", "damping", "families", "inference", "layers", "metrics", "metrics.losses", "operators",
    "problems", "solvers", "transforms",
]  # fmt: skip


def imported(tree):
    """Dotted names of everything that a module imports, at any depth of its code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_run_one_way(path):
    name = room(path)
    if name in SHOWROOMS:
        return
    names = {full.split(".")[1] for full in imported(ast.parse((PACKAGE / path).read_text())) if "natgrad_jax." in full}
    assert names <= ALLOWED[name] | {name}, f"{path} imports {names - ALLOWED[name]}"


def test_the_table_is_an_arrow():
    """No ring: every module may import only those that stand before it in the table."""
    before = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= before, name
        before.add(name)
    assert {room(path) for path in modules()} <= before | SHOWROOMS


@pytest.mark.parametrize("path", modules(), ids=str)
def test_only_public_jax(path):
    private = [name for name in imported(ast.parse((PACKAGE / path).read_text())) if "_src" in name.split(".")]
    assert not private
    assert "jax._src" not in (PACKAGE / path).read_text()


def public_names():
    for module in PUBLIC:
        members = importlib.import_module(f"natgrad_jax.{module}")
        for name, value in vars(members).items():
            ours = getattr(value, "__module__", "").startswith(f"natgrad_jax.{module}")
            if not name.startswith("_") and ours and (inspect.isfunction(value) or inspect.isclass(value)):
                yield f"{module}.{name}", value


@pytest.mark.parametrize(("name", "value"), list(public_names()), ids=lambda x: x if isinstance(x, str) else "")
def test_public_names_are_documented(name, value):
    """A function shows how it is called; a class that a function builds, or an enum, needs a sentence only."""
    doc = inspect.getdoc(value) or ""
    assert doc.strip()
    operator = inspect.isclass(value) and hasattr(value, "product")
    if (inspect.isfunction(value) and name not in HELPERS) or operator:
        assert ">>>" in doc and "Example:" in doc


def test_the_promised_names_exist():
    promised = """fisher_matrix natural_gradient scale_by_metric fit metrics.scales metrics.fisher
        metrics.monte_carlo_fisher metrics.empirical_fisher metrics.gauss_newton metrics.least_squares metrics.pullback
        metrics.quantum_geometric metrics.wasserstein_1d metrics.energy metrics.hessian metrics.relative
        metrics.quasi_diagonal metrics.fisher_information layers.capture metrics.fisher_diagonal
        metrics.check_rows operators.Outer metrics.losses.softmax_cross_entropy check_fisher report
        operators.Diagonal operators.Dense operators.Gram operators.Implicit operators.Kronecker operators.Blocks
        operators.LowRank operators.Closed operators.add operators.scale
        solvers.cholesky solvers.eigh solvers.qr solvers.row_space solvers.cg solvers.diagonal solvers.kronecker
        solvers.auto solvers.solve families.gaussian_full_rank families.gaussian_mean_field families.bernoulli
        families.gaussian_low_rank families.categorical families.chart families.product families.gaussian_mixture
        transforms.with_metric transforms.precondition transforms.trust_region transforms.retract
        transforms.normalise transforms.levenberg_marquardt transforms.quadratic_step transforms.damping_grid
        transforms.grid_search transforms.backtracking transforms.spring transforms.heavy_ball transforms.geodesic
        transforms.average transforms.every_k transforms.accumulate transforms.summary
        metrics.one_pass metrics.score_function metrics.variational_energy
        inference.exact_kl inference.elbo damping.relative damping.absolute damping.trace
        damping.layered damping.metric constraints.real constraints.positive constraints.interval constraints.ordered
        constraints.simplex constraints.correlation constraints.correlation_cholesky constraints.covariance
        constraints.constrain"""
    for name in promised.split():
        value = ng
        for part in name.split("."):
            value = getattr(value, part)
        assert callable(value)
    assert all(hasattr(ng, name) for name in ng.__all__)
    assert sorted(ng.__all__) == ng.__all__
    assert {name.split(".")[0] for name in PUBLIC} <= set(ng.__all__)
