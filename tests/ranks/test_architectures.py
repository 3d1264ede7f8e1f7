"""The table of Hugging Face architectures says what is so."""

from __future__ import annotations

import pytest

from sixfold.testing import Pool
from tests.architectures import ARCHITECTURES, BY_NAME, KEPT_TRUE, PAGE, row


@pytest.mark.parametrize("name", KEPT_TRUE)
def test_the_table_is_true(name: str, rank_pool: Pool) -> None:
    assert row(BY_NAME[name], rank_pool) in PAGE.read_text()


@pytest.mark.matrix
@pytest.mark.parametrize("name", BY_NAME)
def test_all_of_the_table_is_true(name: str, rank_pool: Pool) -> None:
    assert row(BY_NAME[name], rank_pool) in PAGE.read_text()


def test_the_table_has_forty_of_all_kinds() -> None:
    kinds = {each.modality for each in ARCHITECTURES}
    assert len(BY_NAME) == len(ARCHITECTURES) >= 40
    assert kinds == {"text", "image", "speech"}
