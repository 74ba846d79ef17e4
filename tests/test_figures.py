# SPDX-License-Identifier: Apache-2.0
"""Pictures show every layer they were given, legibly, and touch nothing but themselves."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from lightning_bn.figures import signal_propagation

F16, F32, F64 = 65504.0, 3.4028235e38, 1.7976931348623157e308
LONG = "encoder.transformer_blocks.{}.self_attention.output_projection"
PLAIN = "backbone.layer{}"


def draw(stds, absmax=None, *, dtype_max=F32, name="net.{}", title="First training batch"):
    """The figure, drawn once, so that every text has its place."""
    absmax = [4 * std for std in stds] if absmax is None else absmax
    layers = [name.format(place) for place in range(len(stds))]
    figure = signal_propagation(layers, stds, absmax=absmax, dtype_max=dtype_max, title=title)
    FigureCanvasAgg(figure).draw()
    return figure


def curves(figure):
    """What is drawn, by label, as a list of places and heights."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


def marked(figure, kind):
    """The layers that have a mark of a kind, and the legend's entry for it."""
    found = [(label, places) for label, (places, _) in curves(figure).items() if label.startswith(kind)]
    return found[0] if found else None


def texts(figure):
    """Every text of a drawn figure: layer names, ticks, axes, legend, title."""
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    decades = [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    names = axes.get_xticklabels()
    return [*decades, *names, axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts(), figure.texts[0]]


def healthy(depth):
    return [1 + 0.1 * (place % 3) for place in range(depth)]


EXPLODING = [8000.0**place if place < 10 else math.nan for place in range(1, 21)]
VANISHING = [10.0 ** (-2 * place) for place in range(20)]
SPECIMENS = [
    pytest.param({"stds": healthy(20)}, id="healthy"),
    pytest.param({"stds": VANISHING}, id="vanishing to 1e-38"),
    pytest.param({"stds": EXPLODING}, id="inf from layer 10 on"),
    pytest.param({"stds": healthy(200), "name": LONG}, id="200 layers"),
    pytest.param({"stds": healthy(60), "name": PLAIN, "dtype_max": F16}, id="60 layers"),
    pytest.param({"stds": healthy(24), "name": LONG}, id="names of 60 characters"),
    pytest.param({"stds": [1.0, 0, 0, math.nan], "absmax": [2e4, 0, 1, math.inf], "name": LONG}, id="all marks"),
    pytest.param({"stds": [0.7]}, id="one layer"),
    pytest.param({"stds": [0.0]}, id="one layer of zeros"),
    pytest.param({"stds": [math.nan] * 3}, id="NaN only"),
    pytest.param({"stds": [1e-45, 1.0, 1e38], "absmax": [1e-45, 3.0, 3e38]}, id="all of float32"),
    pytest.param({"stds": [5e-324, 1.0, 1e300], "dtype_max": F64}, id="all of float64"),
]


@pytest.fixture(scope="module", params=SPECIMENS)
def drawn(request):
    """A specimen and its picture, drawn once for all tests."""
    return request.param, draw(**request.param)


def test_every_text_lies_inside_the_picture(drawn):
    """Names, ticks, legend and title are not cut off at any edge."""
    _, figure = drawn
    for text in texts(figure):
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, text.get_text()


def test_layer_names_do_not_run_into_one_another(drawn):
    """At most 60 names are written, of at most 28 characters, and each has its own room."""
    boxes = [label.get_window_extent() for label in drawn[1].axes[0].get_xticklabels()]
    assert len(boxes) <= 60
    assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(boxes))


def test_no_layer_is_dropped(drawn):
    """Each layer has a point inside the picture, or a mark that says why it has none."""
    specimen, figure = drawn
    low, high = figure.axes[0].get_ylim()
    places, heights = curves(figure)["standard deviation"]
    shown = {place for place, height in zip(places, heights, strict=True) if low <= height <= high}
    for kind in ("not finite", "exactly 0", "constant"):
        shown |= set((marked(figure, kind) or ("", ()))[1])
    assert shown == set(range(len(specimen["stds"])))


def test_the_legend_covers_no_mark(drawn):
    """It stands above the axes, and room is left between it and the marks at their upper edge."""
    axes = drawn[1].axes[0]
    assert axes.get_legend().get_window_extent().y0 > axes.get_window_extent().y1


def test_heights_are_decimal_logarithms():
    """Standard deviation and largest value are drawn where their logarithms are, and the axis is labelled by powers."""
    figure = draw([1e-3, 2.0, 5e7], [1e-2, 9.0, 8e8])
    assert curves(figure)["standard deviation"][1] == pytest.approx([math.log10(x) for x in (1e-3, 2.0, 5e7)])
    assert curves(figure)["largest |value|"][1] == pytest.approx([math.log10(x) for x in (1e-2, 9.0, 8e8)])
    ticks = {label.get_text(): label.get_position()[1] for label in figure.axes[0].get_yticklabels()}
    assert ticks["$10^{0}$"] == 0


def test_what_is_not_finite_is_marked_and_named():
    """From the layer on at which the signal is inf, each has a mark; the legend names the first and counts on."""
    figure = draw(EXPLODING, [4 * std if std == std else math.inf for std in EXPLODING])  # noqa: PLR0124  (NaN)
    assert marked(figure, "not finite") == ("not finite: net.9 and 10 more", list(range(9, 20)))
    assert marked(figure, "exactly 0") is None
    assert marked(draw(healthy(20)), "not finite") is None


def test_zeros_and_constants_are_told_apart():
    """Zero throughout is not the same as constant: the second still has a largest value."""
    figure = draw([1.0, 0.0, 0.0, 0.0], [4.0, 0.0, 2.0, 0.0])
    assert marked(figure, "exactly 0") == ("exactly 0: net.1 and 1 more", [1, 3])
    assert marked(figure, "constant") == ("constant: net.2", [2])
    assert curves(figure)["largest |value|"][1][2] == math.log10(2)


@pytest.mark.parametrize(
    ("largest", "dtype_max", "drawn"),
    [
        pytest.param(5.0, F32, False, id="far from float32"),
        pytest.param(5.0, F16, False, id="far from float16"),
        pytest.param(50.0, F16, True, id="within 10,000 of float16"),
        pytest.param(1e35, F32, True, id="within 10,000 of float32"),
    ],
)
def test_the_end_of_the_dtype_is_drawn_when_it_comes_into_view(largest, dtype_max, drawn):
    """A labelled line at the largest number, inside the axes, and only where the signal comes near."""
    figure = draw([1.0, largest / 5], [1.0, largest], dtype_max=dtype_max)
    lines = {label: heights for label, (_, heights) in curves(figure).items() if label.startswith("end of the dtype")}
    assert list(lines.values()) == ([[math.log10(dtype_max)] * 2] if drawn else [])
    assert not drawn or math.log10(dtype_max) < figure.axes[0].get_ylim()[1]


def test_a_flat_signal_looks_flat():
    """A change by a tenth is small in the picture: the axis spans two decades at least."""
    low, high = draw(healthy(20)).axes[0].get_ylim()
    assert high - low >= 2


def test_long_names_stay_different():
    """Of long names the words are cut, and the numbers that tell layers apart are kept."""
    names = [label.get_text() for label in draw(healthy(40), name=LONG).axes[0].get_xticklabels()]
    assert len(set(names)) == 40
    assert max(map(len, names)) <= 28


def test_a_dollar_sign_is_no_formula():
    """Names and titles are shown as they are, whatever matplotlib would make of them."""
    figure = draw([1.0, 0.0], name="a${}$_{{", title="$5 and $6")
    assert figure.texts[0].get_text() == r"\$5 and \$6"
    assert all(label.get_text().count(r"\$") == 2 for label in figure.axes[0].get_xticklabels())
    assert marked(figure, "exactly 0")[0] == r"exactly 0: a\$1\$_{"


def test_lengths_have_to_match():
    """A missing number would shift all that come behind it: it is refused."""
    with pytest.raises(ValueError, match="must match, got 2, 2 and 1 entries"):
        signal_propagation(["a", "b"], [1.0, 1.0], absmax=[1.0], dtype_max=F32, title="")


def test_a_picture_can_be_saved_as_it_is():
    """It has a size of its own, as every writer of images asks for."""
    file = io.BytesIO()
    draw(healthy(20)).savefig(file, format="png")
    image = Image.open(file)
    assert image.width > 600
    assert image.height > 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            "import sys; from lightning_bn.figures import signal_propagation as draw\n"
            "assert 'matplotlib' not in sys.modules\n"
            "draw(['a'], [1.0], absmax=[2.0], dtype_max=3e38, title='').savefig('picture.png')\n"
            "assert 'matplotlib.pyplot' not in sys.modules",
            id="no pyplot, no backend",
        ),
        pytest.param(
            "import sys; sys.modules['matplotlib'] = None\n"
            "import lightning_bn, lightning_bn.figures, lightning_bn.sinks",
            id="no matplotlib at all",
        ),
    ],
)
def test_matplotlib_is_asked_for_late_and_little(tmp_path, script):
    """Only drawing needs it, and drawing leaves pyplot, with its backend and global figures, alone."""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
