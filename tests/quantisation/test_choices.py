"""Names of what is measured: once each, in the order given, and refused where there is no such thing."""

import pytest

from melayer.errors import InputError
from melayer.numerics.grids import FORMATS
from melayer.quantisation.calibration import GRANULARITIES
from melayer.quantisation.choices import Choices
from melayer.quantisation.treatments import TREATMENTS


def test_each_once_in_the_order_given():
    found = Choices.of(["fp8", "int8", "fp8"], ["per-token"], ["mask", "plain", "mask"])
    assert found == Choices(("fp8", "int8"), ("per-token",), ("mask", "plain"), explicit=True)
    assert found.n_settings == 4


def test_by_default_all_treatments():
    found = Choices.of(FORMATS, GRANULARITIES)
    assert found == Choices(FORMATS, GRANULARITIES, TREATMENTS, explicit=False)
    assert found.n_settings == 3 * 3 * 4


@pytest.mark.parametrize(
    ("treatments", "masked"), [(None, True), (["plain", "baked"], False), (["mask"], True), (["baked+mask"], True)]
)
def test_whether_a_mask_is_among_them(treatments, masked):
    assert Choices.of(["int8"], ["per-token"], treatments).masked == masked


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            (["int9"], ["per-token"]),
            r"There is no format 'int9'; expected some of int8, int4, fp8. Did you mean 'int8'\?$",
        ),
        ((["int8"], ["x"]), r"There is no granularity 'x'; expected some of per-tensor, per-token, per-channel.$"),
        ((["int8"], ["per-token"], ["bake"]), r"'bake'; expected some of plain, .*, mask. Did you mean 'baked'\?$"),
        (([], ["per-token"]), r"There is no format to measure. Give some of int8, int4, fp8.$"),
        ((["int8"], []), r"There is no granularity to measure. Give some of per-tensor"),
        ((["int8"], ["per-token"], []), r"There is no treatment to measure. Give some of plain"),
        ((["int9"], []), r"There is no format 'int9'"),  # the first that is wrong
    ],
)
def test_names_that_there_are_not(names, said):
    with pytest.raises(InputError, match=said):
        Choices.of(*names)
