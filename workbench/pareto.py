"""Which points no other point beats: the Pareto front of two figures or more."""

import numpy as np


def pareto_front(x, y, *, lower_x: bool = False, lower_y: bool = False) -> np.ndarray:
    """(n,) bool: on the front are the points than which no other is at least as good in both figures and better in one.

    x, y: (n,), more is better; with lower_x or lower_y less is. Equal points stand or fall together, a
    point with NaN is never on the front.
    """
    columns = zip((x, y), (lower_x, lower_y), strict=True)
    return _front(np.column_stack([np.asarray(values, float) * (1 if lower else -1) for values, lower in columns]))


def pareto_points(table, figures) -> np.ndarray:
    """(n,) bool, as pareto_front of any number of figures of which less is better. table: figure -> (n,) values."""
    return _front(np.column_stack([np.asarray(table[name], float) for name in figures]))


def _front(costs):
    """costs: (n, figures), less is better. In lexicographic order each point comes after those that beat it."""
    points, place = np.unique(costs, axis=0, return_inverse=True)
    kept, front = np.zeros(len(points), dtype=bool), np.empty((0, costs.shape[1]))
    for n, point in enumerate(points):
        if not np.isnan(point).any() and not (front <= point).all(axis=1).any():
            kept[n], front = True, np.vstack([front, point])
    return kept[place.ravel()]
