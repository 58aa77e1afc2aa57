"""A bar for a fit that takes long."""

from typing import Any

_bars: list[Any] = []


def check() -> None:
    """An `ImportError` with the cure if there is nothing to draw a bar with."""
    try:
        import tqdm.auto  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}. show_progress draws a bar with tqdm: pip install tqdm") from error


def show(limit: int, count: Any, value: Any, last: Any) -> None:
    """Moves the bar to `count` of `limit` steps; `last` closes it."""
    from tqdm.auto import tqdm

    if not _bars or int(count) == 1:
        close()
        _bars.append(tqdm(total=limit, desc="fit", unit="step"))
    bar = _bars[-1]
    bar.update(int(count) - bar.n)
    bar.set_postfix_str(f"ELBO {float(value):.3f}")
    if bool(last):
        close()


def close() -> None:
    """Closes what is open."""
    while _bars:
        _bars.pop().close()
