# SPDX-License-Identifier: Apache-2.0
"""In a heat map every measured value has its colour at its place, and what went wrong is seen at a glance."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from lightning_bn.heatmaps import BAD, DEAD_SHARE, LOG_STD, UNMEASURED, heatmap
from lightning_bn.stats.history import Grid, History

INF, NAN = math.inf, math.nan
LONG = "model.encoder.transformer_blocks.{}.self_attention_in_front.output_projection"
MAGENTA, GREY, WHITE = (255, 0, 255), tuple(round(255 * part) for part in to_rgb(UNMEASURED)), (255, 255, 255)


def grid_of(values, *, measured=True, steps=None, name="net.{}", stride=1):
    """A grid of these values, ten steps a column unless told otherwise."""
    values = np.array(values, np.float32)
    steps = tuple(10 * column for column in range(values.shape[1])) if steps is None else tuple(steps[:-1])
    layers = tuple(name.format(place) for place in range(len(values)))
    return Grid(layers, steps, steps[-1] + 10.0, values, np.broadcast_to(measured, values.shape), stride)


class Drawn:
    """A figure, its texts and its pixels."""

    def __init__(self, grid, scale=LOG_STD):
        self.figure = heatmap(grid, scale)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        self.pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.axes, self.bar = self.figure.axes
        self.names = [label.get_text() for label in self.axes.get_yticklabels()]
        self.legend = [text.get_text() for legend in self.figure.legends for text in legend.get_texts()]

    def at(self, step, row):
        """The colour in the picture at a step of a layer."""
        x, y = self.axes.transData.transform((step, row))
        return tuple(self.pixels[len(self.pixels) - 1 - int(y), int(x)].tolist())

    def field(self):
        """All pixels between the axes."""
        box = self.axes.get_window_extent()
        rows = slice(len(self.pixels) - int(box.y1) + 1, len(self.pixels) - int(box.y0) - 1)
        return self.pixels[rows, int(box.x0) + 1 : int(box.x1) - 1]


def colour(share, name):
    """Of a colour map, the colour at a share of its length, as pixels have it."""
    return tuple(round(255 * part) for part in mpl.colormaps[name](share)[:3])


def close(pixel, expected, *, by=3):
    return max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) <= by


def healthy(layers=12, columns=20):
    return np.random.default_rng(0).normal(0, 0.2, (layers, columns))


def sick(layers=60, columns=256):
    """One layer dies, one explodes, one is NaN in one column, one is late."""
    values = healthy(layers, columns)
    values[layers // 4] -= np.linspace(0, 6, columns)
    values[layers // 2, columns // 2 :] = 8.5
    values[3 * layers // 4, columns // 3] = NAN
    measured = np.ones(values.shape, bool)
    measured[-1, : columns // 2] = False
    return values, measured


def test_each_value_has_its_colour_at_its_place():
    """Layers lie from top to bottom, steps from left to right where their numbers are, shares between 0 and 1."""
    values, steps = [[0.0, 0.25, 0.5], [1.0, 0.75, 0.1]], [0, 10, 900, 1000]
    drawn = Drawn(grid_of(values, steps=steps), DEAD_SHARE)
    for row, column in itertools.product(range(2), range(3)):
        step = (steps[column] + min(steps[column + 1], 909)) / 2
        assert close(drawn.at(step, row), colour(values[row][column], "cividis")), (row, column)
    assert drawn.at(895, 1) == drawn.at(15, 1) != drawn.at(905, 1)
    assert drawn.at(500, 0) != drawn.at(500, 1)
    assert drawn.names == ["0", "1"]


def test_a_picture_of_a_history_shows_what_was_added():
    """From the monitor's numbers to the pixel: a planted share is found at its step and layer."""
    history = History(8)
    for step in range(100):
        history.add(step, {"a": {"dead": 0.0}, "b": {"dead": 1.0 if step >= 64 else 0.0}})
    drawn = Drawn(history.grid("dead"), DEAD_SHARE)
    expected = [colour(share, "cividis") for share in (0.0, 0.0, 0.0, 1.0)]
    found = [drawn.at(step, row) for row, step in ((0, 20), (0, 90), (1, 60), (1, 70))]
    assert all(map(close, found, expected))
    assert "mean of 16 measured steps" in drawn.axes.get_xlabel()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("scale", [LOG_STD, DEAD_SHARE], ids=["std", "dead"])
def test_what_is_not_finite_is_magenta_and_named(scale, bad):
    """The cell, the layer's name, a mark beside the row and the legend say so; neighbours keep their colour."""
    values = np.abs(healthy())
    values[7, 4:6] = values[3, 9] = bad
    drawn = Drawn(grid_of(values), scale)
    assert [drawn.at(step, 7) for step in (35, 45, 55, 65)][1:3] == [MAGENTA] * 2
    assert MAGENTA not in {drawn.at(35, 7), drawn.at(65, 7), drawn.at(45, 6), drawn.at(45, 8)}
    assert drawn.legend == ["NaN or infinite: from step 40 in 7, later in 1 more"]
    coloured = [label.get_text() for label in drawn.axes.get_yticklabels() if label.get_color() == BAD]
    assert coloured == ["3", "7"]
    assert [line.get_ydata().tolist() for line in drawn.axes.lines] == [[3, 7]]


def test_of_layers_in_one_column_none_is_called_the_first():
    """A merged column cannot tell which layer was NaN before the others, and its step is the first of several."""
    values = healthy()
    values[4:, 15:] = values[2, 16:] = NAN
    drawn = Drawn(grid_of(values, stride=4))
    assert drawn.legend == ["NaN or infinite: from about step 150 in 4 and 7 more, later in 1 more"]


@pytest.mark.parametrize("scale", [LOG_STD, DEAD_SHARE], ids=["std", "dead"])
def test_a_healthy_run_has_no_magenta_no_grey_and_no_legend(scale):
    """Where everything was measured and finite there is nothing to explain."""
    drawn = Drawn(grid_of(np.abs(healthy()).clip(0, 1)), scale)
    assert not (drawn.field() == MAGENTA).all(-1).any()
    assert not (drawn.field() == GREY).all(-1).any()
    assert drawn.legend == []
    assert drawn.axes.lines[:] == []


def test_what_was_not_measured_is_grey_and_hatched():
    """Neither a colour of the scale nor that of NaN, although there is no number in either."""
    values, measured = healthy(), np.ones((12, 20), bool)
    values[2, 5:10], measured[2, 5:10] = NAN, False
    values[2, 10] = NAN
    drawn = Drawn(grid_of(values, measured=measured))
    found = {drawn.at(step, 2 + shift) for step in range(51, 99) for shift in np.linspace(-0.4, 0.4, 9)}
    assert {GREY, WHITE} <= found
    assert all(max(pixel) - min(pixel) <= 2 and min(pixel) >= GREY[0] - 2 for pixel in found)
    assert drawn.at(105, 2) == MAGENTA
    assert drawn.legend == ["NaN or infinite: from step 100 in 2", "not measured"]


def test_one_bad_cell_among_many_is_seen():
    """In a picture of 200 layers and 256 columns it has at least ten pixels, and its layer is named and marked."""
    values = healthy(200, 256)
    values[101, 77] = NAN
    drawn = Drawn(grid_of(values))
    assert (drawn.field() == MAGENTA).all(-1).sum() >= 10
    assert "101" in drawn.names
    assert drawn.axes.lines[0].get_ydata().tolist() == [101]


def test_an_exploding_layer_is_seen_and_flattens_no_other():
    """It has the bright end of the scale, a layer that dies the dark end; the others keep their differences."""
    values, measured = sick(12)
    values[0], values[1] = -0.15, 0.15
    drawn = Drawn(grid_of(values, measured=measured))
    assert close(drawn.at(2500, 6), colour(1.0, "viridis"))
    assert close(drawn.at(2500, 3), colour(0.0, "viridis"))
    assert not close(drawn.at(2500, 0), drawn.at(2500, 1), by=25)
    assert "down to" in drawn.bar.get_xlabel()
    assert r"up to $3.2 \cdot 10^{8}$" in drawn.bar.get_xlabel()


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(healthy(), id="healthy"),
        pytest.param(np.repeat(np.linspace(0, -20, 30)[:, None], 5, axis=1), id="vanishing over depth"),
        pytest.param(healthy(20, 40) + 9 * (np.arange(40) > 25), id="all layers explode"),
        pytest.param(np.zeros((3, 4)), id="constant"),
    ],
)
def test_colours_are_clipped_only_where_few_values_are_extreme(values):
    """Where many layers differ they all are on the scale, and nothing is said of pointed ends."""
    drawn = Drawn(grid_of(values))
    low, high = drawn.axes.collections[0].get_clim()
    assert low <= values.min() + 1e-6
    assert values.max() - 1e-6 <= high
    assert drawn.bar.get_xlabel() == LOG_STD.label


def test_a_steady_signal_looks_steady():
    """A scale of standard deviations spans a decade at least, so that 2 % of noise does not fill it with colours."""
    drawn = Drawn(grid_of(0.3 + healthy() / 20))
    low, high = drawn.axes.collections[0].get_clim()
    assert high - low == pytest.approx(1)
    assert (low + high) / 2 == pytest.approx(0.3, abs=0.05)


def test_a_standard_deviation_of_zero_is_the_smallest_not_an_error():
    """Its logarithm, -inf, has the dark end of the scale, which the colour bar says; a share of -inf is an error."""
    values = healthy()
    values[4, 10:] = -INF
    drawn = Drawn(grid_of(values))
    assert close(drawn.at(150, 4), colour(0.0, "viridis"))
    assert drawn.bar.get_xlabel().endswith("in their colours: down to 0")
    assert drawn.legend == []
    assert Drawn(grid_of(values), DEAD_SHARE).at(150, 4) == MAGENTA


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([[-0.5, 0.5]], ["0.5", "1", "2"], id="one decade"),
        pytest.param([[-2.0, 0.5]], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"], id="two decades"),
        pytest.param(
            [[-8.0, 4.0]], [f"$10^{{{power}}}$" for power in (-8, -6, -4)] + ["0.01", "1", "100", "$10^{4}$"], id="many"
        ),
    ],
)
def test_the_colour_bar_shows_the_standard_deviation_itself(values, expected):
    """Its ticks are round numbers, not their logarithms, and each stands at its logarithm."""
    drawn = Drawn(grid_of(values))
    ticks = {label.get_text(): label.get_position()[0] for label in drawn.bar.get_xticklabels()}
    assert list(ticks) == expected
    plain = {float(text.replace("$10^{", "1e").replace("}$", "")): place for text, place in ticks.items()}
    assert list(plain.values()) == pytest.approx([math.log10(value) for value in plain])


@pytest.mark.parametrize("scale", [LOG_STD, DEAD_SHARE], ids=["std", "dead"])
def test_title_and_axes_say_what_is_seen(scale):
    """The title asks the question, the colour bar names the statistic, the axes name layers and steps."""
    drawn = Drawn(grid_of(healthy()), scale)
    assert drawn.figure.get_suptitle() == scale.question
    assert drawn.figure.get_suptitle().endswith("?")
    assert drawn.bar.get_xlabel().startswith(scale.label)
    assert drawn.axes.get_xlabel() == "optimizer step"
    assert drawn.axes.get_ylabel() == "layer in net"


SPECIMENS = [
    pytest.param(grid_of([[0.0]]), id="one cell"),
    pytest.param(grid_of([[NAN]]), id="NaN alone"),
    pytest.param(grid_of([[NAN]], measured=False), id="nothing measured"),
    pytest.param(grid_of(np.full((80, 30), NAN)), id="NaN throughout"),
    pytest.param(grid_of(sick(12, 20)[0], measured=sick(12, 20)[1]), id="12 layers"),
    pytest.param(grid_of(sick()[0], measured=sick()[1], name="backbone{}.conv", stride=4), id="60 layers"),
    pytest.param(grid_of(sick(61)[0], measured=sick(61)[1], name=LONG), id="61 layers, long names"),
    pytest.param(grid_of(sick(200)[0], name=LONG, steps=range(10**7, 2 * 10**7, 39000)), id="200 layers, late steps"),
    pytest.param(grid_of(healthy(90) * 1e3, name="{0}" + LONG.replace("{}", "{0}")), id="names that share nothing"),
    pytest.param(grid_of([[-45.0, 38.0], [-INF, 300.0]]), id="both ends of float32 and beyond"),
]


@pytest.fixture(scope="module", params=SPECIMENS)
def drawn(request):
    """A specimen, drawn once for all tests."""
    return Drawn(request.param)


def test_every_text_lies_inside_the_picture(drawn):
    """Names, ticks, labels, legend and title are not cut off at any edge."""
    axes, bar, figure = drawn.axes, drawn.bar, drawn.figure
    low, high = axes.get_xlim()
    steps = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    legend = [text for legend in figure.legends for text in legend.get_texts()]
    for text in [
        *(*axes.get_yticklabels(), *steps, axes.xaxis.label, axes.yaxis.label),
        *(*bar.get_xticklabels(), bar.xaxis.label, *legend, *figure.texts),
    ]:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, text.get_text()


def test_names_and_ticks_do_not_run_into_one_another(drawn):
    """At most 60 layers are named, in at most 28 characters, and each name and each tick has its own room."""
    names = sorted((label.get_window_extent() for label in drawn.axes.get_yticklabels()), key=lambda box: box.y0)
    assert 1 <= len(names) <= 60
    assert max(map(len, drawn.names)) <= 28
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(names))
    ticks = [label.get_window_extent() for label in drawn.bar.get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(ticks))


def test_the_picture_grows_with_the_layers_up_to_a_limit(drawn):
    """Every layer has at least one row of pixels, up to a height that TensorBoard can still show."""
    width, height = drawn.figure.get_size_inches() * drawn.figure.dpi
    rows = drawn.axes.get_window_extent().height / (drawn.axes.get_ylim()[0] + 0.5)
    assert (width, height <= 1700, rows >= 5) == (1155, True, True)


def test_what_all_layers_share_is_said_once():
    """Names are shown from where they differ; the label of the axis has the rest."""
    drawn = Drawn(grid_of(healthy(), name="model.encoder.block{}.conv"))
    assert drawn.names[:2] == ["block0.conv", "block1.conv"]
    assert drawn.axes.get_ylabel() == "layer in model.encoder"


def test_magenta_stands_out_to_every_eye():
    """It is far from every colour of both scales and from grey, as seen normally and with each colour blindness."""
    for scale, kind in itertools.product((LOG_STD, DEAD_SHARE), EYES):
        colours = [*mpl.colormaps[scale.colours](np.linspace(0, 1, 256))[:, :3], to_rgb(UNMEASURED), (1, 1, 1)]
        distances = np.linalg.norm(lab(np.array(colours), kind) - lab(np.array(to_rgb(BAD)), kind), axis=-1)
        assert distances.min() > 34, (scale.colours, kind)


EYES = {
    "normal": np.eye(3),
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""What is left of linear RGB (Machado, Oliveira & Fernandes 2009, severity 1)."""


def lab(rgb, kind):
    """CIELAB coordinates, for D65, of what an eye sees of sRGB colours."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.transpose(EYES[kind])).clip(0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    xyz = linear @ np.transpose(to_xyz) / (0.95047, 1, 1.08883)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def test_a_dollar_sign_is_no_formula():
    """Names are shown as they are, whatever matplotlib would make of them."""
    values = healthy()
    values[0] = NAN
    drawn = Drawn(grid_of(values, name="a$.b{}$_{{"))
    assert drawn.names[0] == r"b0\$_{"
    assert drawn.axes.get_ylabel() == r"layer in a\$"
    assert drawn.legend == [r"NaN or infinite: from step 0 in b0\$_{"]


def test_a_grid_without_layers_is_refused():
    """There would be nothing to see."""
    with pytest.raises(ValueError, match="grid must have at least one layer, got none"):
        heatmap(Grid((), (0,), 1.0, np.zeros((0, 1), np.float32), np.zeros((0, 1), bool), 1), LOG_STD)


@pytest.mark.slow
def test_matplotlib_is_asked_for_late_and_little(tmp_path):
    """Only drawing needs it, and drawing leaves pyplot, with its backend and global figures, alone."""
    script = (
        "import sys; from lightning_bn.heatmaps import DEAD_SHARE, heatmap\n"
        "from lightning_bn.stats.history import History\n"
        "assert 'matplotlib' not in sys.modules\n"
        "history = History(); history.add(0, {'fc': {'dead': 0.5}})\n"
        "heatmap(history.grid('dead'), DEAD_SHARE).savefig('picture.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
