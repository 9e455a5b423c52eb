"""Pages: what is text stays text, whatever it holds; the terminal's tables and pictures as a page takes them."""

import importlib.resources
import re
from html.parser import HTMLParser

import jinja2
import pytest
from rich.table import Table
from rich.text import Text

from zipr1.core.page import Column, PageTable, Tile, compared, page_table, render

NAME = '<b>a|b</b> & "c" {{ 1 }} [red]d[/red]'


class Words(HTMLParser):
    """The text of a page by element, as a browser reads it."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if data.strip() and self.open:
            self.texts.append((self.open[-1][0], data.strip()))


def profile_page(**more):
    values = {
        "title": NAME,
        "name": NAME,
        "headline": NAME,
        "lead": NAME,
        "advice": NAME,
        "tiles": [Tile(NAME, NAME, NAME, NAME)],
        "notes": [NAME],
        "figures": ["<svg></svg>"],
        "tables": [PageTable(NAME, NAME, [Column(NAME, True), Column("n", False)], [[NAME, "1"]])],
    }
    return render("profile.html", **(values | more))


def test_names_are_text_and_nothing_else():
    page = profile_page()
    words = Words(page)
    assert words.tags.count("b") == 1 and page.startswith("<!doctype html>")
    for place in ("title", "h1", "h2", "p", "th", "td", "b", "span"):
        assert (place, NAME) in words.texts, place


def test_a_page_needs_nothing_beside_it():
    page = profile_page()
    assert "<script" not in page and "http" not in page and "<link" not in page
    assert "font-variant-numeric" in page  # the style sheet is inside


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="name"):
        render("profile.html", title="a", figures=[], tables=[], notes=[])


def test_a_table_of_the_terminal():
    table = Table(title="[bold]scores[/] :boom:", caption=r"of \[all]")
    table.add_column("name")
    table.add_column("ms", justify="right")
    table.add_row("[green]a[/]", Text("[1]"))  # a name: consoles read no markup
    columns = [Column("name", True), Column("ms", False)]
    assert page_table(table) == PageTable(
        "[bold]scores[/] :boom:", r"of \[all]", columns, [["[green]a[/]", "[1]"]]
    )
    assert page_table(Table()) == PageTable("", "", [], [])
    page = profile_page(tables=[page_table(table)])
    assert '<th class="left">name</th>' in page and "<th>ms</th>" in page
    assert '<td class="left" data-name="name">[green]a[/]</td>' in page
    assert '<td data-name="ms">[1]</td>' in page


@pytest.mark.parametrize(
    ("dense", "sparse", "words"),
    [
        (30.0, 20.0, "1.50x faster than dense"),
        (20.0, 25.0, "slower than dense (0.80x)"),
        (20.0, 20.01, "as fast as dense"),
    ],
)
def test_x_is_times_faster(dense, sparse, words):
    assert compared(dense, sparse) == words


def rules(css):
    """By selector the declarations of a style sheet, those for narrow screens apart."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    narrow = "".join(re.findall(r"@media \(max-width: 700px\) \{((?:[^{}]*\{[^{}]*\})*)\s*\}", css))
    wide = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}", "", css)
    found = []
    for part in (wide, narrow):
        bodies: dict[str, str] = {}
        for names, body in re.findall(r"([^{}]+)\{([^{}]*)\}", part):
            for name in map(str.strip, names.split(",")):
                bodies[name] = bodies.get(name, "") + body
        found.append(bodies)
    return found


def test_a_telephone_has_room_for_every_page():
    """On 400 pixels nothing has a width of its own above what the page's margins leave, and tables become blocks whose
    cells bear the names of their columns."""
    page = profile_page(figures=["<svg></svg>"])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    wide, narrow = rules(style)
    margin = int(re.search(r"padding: \d+px (\d+)px", narrow["main"])[1])
    for selector, body in wide.items():
        flexible = re.sub(r"min\(100%, \d+px\)|max-width: \d+px", "", body)
        sizes = re.findall(r"(?:width|columns|basis)[^;]*?(\d+)px", flexible)
        assert all(int(size) <= 400 - 2 * margin for size in sizes), selector
    assert "max-width: 100%" in wide[".figure svg"] and "width: 100%" in wide[".pair img"]
    assert "overflow-x: auto" in wide[".card"]
    assert narrow["thead"].strip() == "display: none;"
    assert all("display: block" in narrow[name] for name in ("table", "tbody", "tr"))
    assert "attr(data-name)" in narrow["td::before"] and "white-space: normal" in narrow["td"]
    cells = re.findall(r"<td[^>]*>", page)
    assert cells and all('data-name="' in cell for cell in cells)
    templates = importlib.resources.files("zipr1") / "assets" / "templates"
    assert {p.name for p in templates.iterdir() if "<td" in p.read_text()} == {"parts.html"}
