"""`python -m natgrad_jax`: the main job, see `natgrad_jax.demo`."""

import sys

from natgrad_jax.demo import main

if __name__ == "__main__":
    sys.exit(main())
