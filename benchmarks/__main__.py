"""The runner: prints a benchmark's rows and saves them with versions, device and load."""

import argparse
import datetime
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jaxlib
import optax

import natgrad_jax as ng
from natgrad_jax.demo import double_precision

NAMES = (
    "inference", "full_rank", "jacobian", "solvers", "metrics", "transforms", "rules", "adapters", "posteriors",
    "peers", "layers",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs one benchmark, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--fast", action="store_true", help="small sizes, one repeat; nothing is saved unless --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON files (benchmarks/results)")
    options = parser.parse_args()
    folder = options.out or (None if options.fast else RESULTS)
    for name in NAMES if options.name == "all" else (options.name,):
        run_one(name, options.fast, folder)


def run_one(name: str, fast: bool, folder: Path | None) -> None:
    """Runs `benchmarks/name.py`, prints its rows and saves them."""
    module = importlib.import_module(f"benchmarks.{name}")
    record: dict[str, Any] = {"benchmark": name, "fast": fast, **circumstances()}
    print(f"{name}: {(module.__doc__ or '').splitlines()[0]}")
    with double_precision():
        record["rows"] = module.run(fast)
    record["rows"] = [{key: _finite(value) for key, value in row.items()} for row in record["rows"]]
    record["load after"] = os.getloadavg()
    for row in record["rows"]:
        print("  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{record['device']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"saved: {path}")


def circumstances() -> dict[str, Any]:
    """Versions, device and load: what a figure depends on."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "natgrad_jax": ng.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "device": "cpu" if device.platform == "cpu" else device.device_kind.replace(" ", "-"),
        "cores": os.cpu_count(),
        "load before": os.getloadavg(),
    }


def _finite(value: Any) -> Any:
    return "never" if value in (float("inf"), float("-inf")) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
