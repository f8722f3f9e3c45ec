"""SVG that an XML parser reads, with points where their values are."""

from xml.etree import ElementTree as ET

from hypothesis import assume, given
from hypothesis import strategies as st

from miaobi.report.curves import HEIGHT, WIDTH, Line, bars, chart, downsampled, ticks

SVG = "http://www.w3.org/2000/svg"
values = st.floats(-1e12, 1e12)


def parsed(markup: str) -> ET.Element:
    return ET.fromstring(str(markup).replace("<svg ", f'<svg xmlns="{SVG}" ', 1))


@given(st.lists(st.tuples(st.integers(0, 10**9), values), min_size=1, max_size=30))
def test_every_curve_lies_within_its_picture(points):
    picture = parsed(chart([Line("a <b> & c", sorted(points), "s0 bold", dots=True)], "what & <it> is"))
    for line in picture.iter(f"{{{SVG}}}polyline"):
        for pair in line.get("points").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_lower_values_lie_lower():
    picture = parsed(chart([Line("loss", [(0, 3.0), (10, 1.0), (20, 2.0)], "s0")], "loss"))
    (line,) = picture.iter(f"{{{SVG}}}polyline")
    heights = [float(pair.split(",")[1]) for pair in line.get("points").split()]
    assert heights[1] > heights[2] > heights[0]  # downwards in SVG


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=8))
def test_no_note_covers_another(at):
    lines = [Line("loss", [(0, 0.0), (100, 10.0)], "s0")]
    picture = parsed(chart(lines, "loss", marks=[(x, y, "6.093", "s0") for x, y in at]))
    notes = [(float(t.get("x")), float(t.get("y"))) for t in picture.iter(f"{{{SVG}}}text") if t.get("class") == "note"]
    assert len(notes) == len(at)
    for i, (x, y) in enumerate(notes):
        assert all(abs(x - other) >= 47.9 or abs(y - height) >= 12.8 for other, height in notes[:i])


def test_there_is_no_picture_of_nothing():
    assert chart([], "x") == ""
    assert chart([Line("x", [], "s0")], "x") == ""
    assert bars([], "x") == ""


@given(values, st.floats(1e-9, 1e9))
def test_ticks_are_few_and_within(low, span):
    assume(span > 1e-9 * abs(low))  # floats have no ticks in between
    found = ticks(low, low + span)
    assert len(found) <= 7
    assert all(low - span * 1e-6 <= t <= low + span * (1 + 1e-6) for t in found)


def test_many_points_are_averaged_and_the_ends_kept():
    points = [(float(i), float(i % 2)) for i in range(100_001)]
    found = downsampled(points, 100)
    assert len(found) <= 100
    assert found[0] == points[0]
    assert found[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.01 for _, y in found[1:-1])


def test_a_bar_is_as_high_as_its_number():
    picture = parsed(bars([("1", 10), ("2", 5), ("4", 0)], "lengths"))
    heights = [float(bar.get("height")) for bar in picture.iter(f"{{{SVG}}}rect")]
    assert heights == [130.0, 65.0, 0.0]
