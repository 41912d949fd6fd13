"""Do transforms of PLW rise, and lead back?"""

import numpy as np
import pytest

from plw_mlflow.errors import UserError
from plw_mlflow.transforms import AXES, SHARE_AXES, make_transform

PLWS = [0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1]


@pytest.mark.parametrize("odds", [(0.0, 12.0), (0.0, 0.1), (0.5, 2.0)])
@pytest.mark.parametrize("axis", AXES)
def test_a_transform_rises_and_comes_back(axis, odds):
    transform = make_transform(axis, PLWS, odds)
    plws = np.unique([*np.linspace(0, 1, 101), *PLWS])
    w = transform(plws)
    assert (np.diff(w) > 0).all()
    assert transform.back(w) == pytest.approx(plws, abs=1e-9)
    assert (w[0], w[-1]) == pytest.approx(transform.ends)


def test_a_share_by_hand():
    """At PLW 0.242 the prompts of AlpacaDataShort, 179.27 tokens to 14.62, have three quarters of the loss weight."""
    share = make_transform("share", PLWS, (0.0, 179.27 / 14.62))
    assert float(share(0.242)) == pytest.approx(0.242 * 179.27 / (0.242 * 179.27 + 14.62))
    assert float(share(0.242)) == pytest.approx(0.75, abs=0.005)
    assert float(make_transform("share", PLWS, (0.0, 20.63 / 162.74))(0.242)) == pytest.approx(0.03, abs=0.001)


@pytest.mark.parametrize("axis", SHARE_AXES)
def test_an_axis_of_shares_needs_them(axis):
    with pytest.raises(
        UserError, match=r"needs the prompts' share of the loss weight .* column prompt_share or from --ratios"
    ):
        make_transform(axis, PLWS)
