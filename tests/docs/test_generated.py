import pytest

from tests.docs.generated import BLOCK, PAGES, blocks, renewed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_made_from_the_code_is_up_to_date(page):
    text = page.read_text()
    assert text == renewed(text), "run: make docs"


def test_every_block_is_in_one_page():
    found = [match[2] for page in PAGES for match in BLOCK.finditer(page.read_text())]
    assert sorted(found) == sorted(blocks())
