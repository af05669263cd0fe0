import numpy as np
import pandas as pd
import pytest

from workbench.checks import check_whole


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), pd.Series([3])[0], np.arange(4)[-1]])
def test_whole_numbers_become_python_s(value):
    assert check_whole("who", "size", value, 1) == 3 and type(check_whole("who", "size", value, 3, 3)) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float64(3), "3", None, np.array([3]), 0, 6, np.int64(6)])
def test_messages(value):
    with pytest.raises(ValueError) as error:
        check_whole("who", "size", value, 1, 5)
    assert str(error.value) == f"who needs a whole size from 1 to 5, got {value!r}"
    if value is None:
        with pytest.raises(ValueError, match="^who needs a whole size of at least 1, got None$"):
            check_whole("who", "size", value, 1)
