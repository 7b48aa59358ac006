from tests.docs.generated import BLOCK, PAGE, blocks, renewed


def test_what_is_made_from_the_code_is_up_to_date():
    text = PAGE.read_text()
    assert {found[2] for found in BLOCK.finditer(text)} == set(blocks())
    assert text == renewed(text), "run: make docs"
