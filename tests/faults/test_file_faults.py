"""Every file operation of a run may fail (F4): a sample of the campaign in file_faults.py."""

from pathlib import Path

import pytest
from file_faults import Campaign, cases


@pytest.fixture(scope="module")
def campaign(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(world, tmp_path_factory.mktemp("campaign"))


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["cpt", "resume"])
def test_a_file_operation_that_fails_is_one_sentence_and_loses_nothing(
    campaign: Campaign, kind: str
) -> None:
    total = campaign.total(kind)
    assert total > 50
    wrong = campaign.check(kind, cases(total, step=total // 5))
    assert not wrong, "\n".join(wrong)
