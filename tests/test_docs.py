"""The recipes of the documentation, run from top to bottom; their assertions are in the text."""

import re
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "docs" / "recipes.md"
DOUBLE = 'jax.config.update("jax_enable_x64", True)\n'  # the fixture does it for this test alone


def test_recipes_run(float64):
    code = "\n".join(re.findall(r"```python\n(.*?)```", RECIPES.read_text(), re.DOTALL))
    assert code.count("assert") >= 6 and DOUBLE in code
    exec(compile(code.replace(DOUBLE, ""), str(RECIPES), "exec"), {})
