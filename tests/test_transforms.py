"""Do transforms of PLW rise, and lead back?"""

import numpy as np
import pytest

from plw_mlflow.transforms import TRANSFORMS, make_transform

PLWS = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_rises_and_comes_back(name):
    transform = make_transform(name, PLWS)
    plws = np.unique([*np.linspace(0, 1, 101), *PLWS])
    w = transform(plws)
    assert (np.diff(w) > 0).all()
    assert transform.back(w) == pytest.approx(plws, abs=1e-9)
    assert (w[0], w[-1]) == pytest.approx(transform.ends)
