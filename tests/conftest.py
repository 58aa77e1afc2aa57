"""Laws run in both precisions within one session; JAX_ENABLE_X64 decides the mode around them."""

import cases
import numpy as np
import pytest


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """The dtype of a law. float32 runs in the ambient mode: with x64 on, a silent promotion would show."""
    if request.param == "float32":
        yield np.dtype("float32")
        return
    with cases.x64():
        yield np.dtype("float64")


@pytest.fixture
def float64():
    """For tests whose tolerance needs double precision."""
    with cases.x64():
        yield np.dtype("float64")
