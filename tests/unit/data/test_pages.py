"""Pages: what one shows is kept and stays apart, and none ends a build or holds it up."""

from __future__ import annotations

import pytest

from bloomery.data.pages import MAX_UNCLOSED, UnclosedTags, strip_html
from bloomery.data.readers import document


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("plain & simple AT&T", "plain & simple AT&T"),
        ("<p>x</p> done by AT&T", "x\n done by AT&T"),
        ("<dl><dt>term</dt><dd>definition</dd></dl>", "term\ndefinition"),
        ("<tr><td>Name</td><td>Value</td></tr><tr><th>a</th><td>b</td></tr>", "Name Value\na b"),
        ("<title>Iron</title><h5>Ore</h5>From it<section>comes</section><blockquote>steel</blockquote>",
         "Iron\nOre\nFrom it\ncomes\nsteel"),
        ("one<br/>two <b>bold</b>face<script>hidden()</script>", "one\ntwo boldface"),
    ],
)  # fmt: skip
def test_what_a_page_shows_is_whole_and_its_blocks_stand_apart(page: str, shown: str) -> None:
    assert document("page.html", strip_html(page)).text == shown


@pytest.mark.parametrize("unknown", ["<![foo[ x ]]>", "<![ 4 < 5]>", "<![endif]-->", "<![CDATA[ x ]]>", "<![if IE]>"])
def test_marked_sections_of_any_kind_end_no_build(unknown: str) -> None:
    assert strip_html(f"<p>before {unknown}<b>after</b></p>").startswith("before ")
    assert "after" in strip_html(f"<p>before {unknown}<b>after</b></p>")


@pytest.mark.parametrize("page", ["<a ", "<!--", "</a ", "<?x", "<!doctype", "<![CDATA[", "<![foo[", "</", "<b><!--"])
def test_ends_that_are_not_there_are_not_looked_for_again_and_again(page: str) -> None:
    with pytest.raises(UnclosedTags):
        strip_html(page * 100)


def test_a_few_unclosed_tags_are_text() -> None:
    assert strip_html("if a <b and c <d") == "if a <b and c <d"
    with pytest.raises(UnclosedTags):
        strip_html("<p>x</p>" + "<b " * (MAX_UNCLOSED + 1))
