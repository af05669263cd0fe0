"""Which points no other point beats: the Pareto front of two figures."""

import numpy as np


def pareto_front(x, y, *, lower_x: bool = False, lower_y: bool = False) -> np.ndarray:
    """(n,) bool: on the front are the points than which no other is at least as good in both figures and better in one.

    x, y: (n,), more is better; with lower_x or lower_y less is. Equal points stand or fall together, a
    point with NaN is never on the front.
    """
    x, y = (np.asarray(values, float) * (-1 if lower else 1) for values, lower in ((x, lower_x), (y, lower_y)))
    no_worse = (x >= x[:, None]) & (y >= y[:, None])  # (i, j): j is at least as good as i in both
    better = (x > x[:, None]) | (y > y[:, None])
    return ~(no_worse & better).any(axis=1) & ~np.isnan(x + y)
