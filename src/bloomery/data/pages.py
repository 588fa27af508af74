"""What a page of HTML shows, as text. Pages are what others wrote: none may end a build, or hold it up for long."""

from __future__ import annotations

from html.parser import HTMLParser

MAX_UNCLOSED = 20
"""Looking for an end that is not there reads the rest of the page, each time: a page with more such tags is dropped."""

_LAID_OUT = """
    title p div br hr ul ol li dl dt dd table caption thead tbody tr h1 h2 h3 h4 h5 h6 pre blockquote section article
    header footer nav main aside figure figcaption form fieldset option address details summary
"""
_BLOCKS = frozenset(_LAID_OUT.split())
_CELLS = ("td", "th")


class UnclosedTags(ValueError):
    """A page has more than MAX_UNCLOSED tags without an end."""


class _Text(HTMLParser):
    """Collects what is shown: a block begins and ends a line, a cell is set off by a blank."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0
        self.unclosed = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")
        self._set_off(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0
        self._set_off(tag)

    def handle_data(self, data: str) -> None:
        if data and not self.hidden:
            self.parts.append(data)

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Of a kind unknown to the parser, which asserts that there is none: a browser ends it at the next `>`."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def parse_starttag(self, i: int) -> int:
        """This and the others return where what begins at `i` ends, or -1."""
        return self._counted(super().parse_starttag(i))

    def parse_endtag(self, i: int) -> int:
        return self._counted(super().parse_endtag(i))

    def parse_comment(self, i: int, report: bool = True) -> int:
        return self._counted(super().parse_comment(i, report))

    def parse_pi(self, i: int) -> int:
        return self._counted(super().parse_pi(i))

    def parse_html_declaration(self, i: int) -> int:
        return self._counted(super().parse_html_declaration(i))

    def _counted(self, end: int) -> int:
        self.unclosed += end < 0
        if self.unclosed > MAX_UNCLOSED:
            raise UnclosedTags
        return end

    def _set_off(self, tag: str) -> None:
        before = self.parts[-1][-1] if self.parts else "\n"
        if tag in _BLOCKS and before != "\n":
            self.parts.append("\n")
        elif tag in _CELLS and not before.isspace():
            self.parts.append(" ")


def strip_html(text: str) -> str:
    """The visible text of a page. Raises UnclosedTags."""
    parser = _Text()
    parser.feed(text)
    parser.close()  # the parser holds back the text after a last `&`
    return "".join(parser.parts)
