"""What transports check of offers alike (offers.py)."""

from __future__ import annotations

import pytest
from pydantic_core import PydanticCustomError

from datadist.base.offers import check_version, overlap


def test_overlap() -> None:
    assert overlap([(10, 5), (0, 10), (15, 1)]) is None
    assert overlap([(10, 5), (0, 11)]) == 10


def test_another_version_names_both_and_what_to_install() -> None:
    assert check_version(3, 3, "datadist-acme") == 3
    with pytest.raises(PydanticCustomError) as caught:
        check_version("x", 3, "datadist-acme")
    assert caught.value.message() == (
        "it is 'x', this release needs 3: install the same release of datadist-acme for all ranks"
    )
