# SPDX-License-Identifier: Apache-2.0
"""Pictures of the verdict show each number that they were given, legibly, and say where one has no place on an axis."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color

from lightning_bn.rules.noisy_batch_statistics import NOISY, SEVERE
from lightning_bn.rules.verdict import HALF
from lightning_bn.stats.attribution import Losses
from lightning_bn.verdict_figures import attribution, effective_samples, loss_curves

INF, NAN = math.inf, math.nan
LONG = "encoder.transformer_blocks.{}.self_attention.output_projection"
OKABE_ITO = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
VERDICT = (
    "with statistics estimated anew for both, val_loss rose from 0.4213 (epoch 7) to 0.7134 (+69%, 12.3 standard "
    "errors) while the training loss fell; putting γ and β alone back to that epoch takes away 55% to 70% of the rise"
)


class Drawn:
    """A figure, drawn once, so that every text has its place."""

    def __init__(self, figure):
        FigureCanvasAgg(figure).draw()
        self.figure, self.axes = figure, figure.axes[0]
        self.legend = [text.get_text() for text in figure.legends[0].get_texts()]
        self.rows = [label.get_text() for label in self.axes.get_yticklabels()]

    def line(self, start):
        """The one line with a label that begins so."""
        (line,) = [line for line in self.axes.lines if line.get_label().startswith(start)]
        return line

    def points(self, start):
        """Its places and heights."""
        line = self.line(start)
        return list(line.get_xdata()), list(line.get_ydata())

    def has(self, part):
        return any(part in entry for entry in self.legend)

    def texts(self):
        """All that is written, ticks outside the limits left out."""
        ticks = []
        for axis, limits in ((self.axes.xaxis, self.axes.get_xlim()), (self.axes.yaxis, self.axes.get_ylim())):
            which = 0 if axis is self.axes.xaxis else 1
            labels = axis.get_ticklabels()
            ticks += [label for label in labels if min(limits) <= label.get_position()[which] <= max(limits)]
        labels = [self.axes.xaxis.label, self.axes.yaxis.label, self.axes.title, *self.figure.texts, *self.axes.texts]
        return [text for text in (*ticks, *labels, *self.figure.legends[0].get_texts()) if text.get_text()]


def curves(train, valid, *, epochs=None, best=None, name="val_loss", verdict=""):
    """The losses by epoch, the smallest of validation the best."""
    known = [(value, place) for place, value in enumerate(valid) if math.isfinite(value)]
    best = (min(known)[1] if known else 0) if best is None else best
    epochs = range(len(valid)) if epochs is None else epochs
    return Drawn(loss_curves(epochs, train, valid, best=best, name=name, verdict=verdict))


def parts(first, last, *, before=0.4, after=0.7, name="val_loss"):
    """A rise of which γ and β carry these shares, moved first and moved last."""
    losses = before + first * (after - before), after - last * (after - before)
    return Drawn(attribution(before, after, *losses, name=name, best_epoch=7))


def noise(values, *, name="net.{}.bn"):
    """m_eff by layer, with the thresholds of the rule."""
    layers = [name.format(place) for place in range(len(values))]
    return Drawn(effective_samples(layers, values, noted=NOISY, severe=SEVERE))


def spread(count):
    return [1.2 * 1.1 ** (37 * place % 80) for place in range(count)]


FALLING, TURNING = [2.0 / (k + 1) for k in range(20)], [0.5 + (k - 7) ** 2 / 100 for k in range(20)]
SICK = [NAN if k in {3, 9, 10} else INF if k == 19 else value for k, value in enumerate(TURNING)]
NAME = "valid/cross_entropy_of_the_second_head_per_token/dataloader_idx_0_of_the_evaluation"
SPECIMENS = [
    pytest.param(lambda: curves(FALLING, TURNING), id="losses"),
    pytest.param(lambda: curves([NAN, *FALLING[1:]], SICK, verdict=VERDICT), id="losses with NaN"),
    pytest.param(lambda: curves(FALLING, SICK, verdict=4 * VERDICT, name=NAME), id="long verdict and name"),
    pytest.param(lambda: curves(FALLING, TURNING, verdict="12345.6789 " * 60), id="verdict of wide letters"),
    pytest.param(lambda: curves([0.5], [NAN], epochs=[3]), id="one validation, NaN"),
    pytest.param(lambda: curves([NAN, INF], [NAN, -INF]), id="nothing finite"),
    pytest.param(lambda: curves([1e-38, 1.0], [3e38, 1.0]), id="all of float32"),
    pytest.param(lambda: curves([-3e38, 0.0], [3e38, 1.0]), id="all of float32, both signs"),
    pytest.param(lambda: curves([0.0] * 3, [0.0] * 3), id="zeros"),
    pytest.param(lambda: curves([1.0] * 500, [1e5 + k for k in range(500)]), id="500 validations"),
    pytest.param(lambda: parts(0.55, 0.7), id="a part"),
    pytest.param(lambda: parts(-0.3, 0.1, name=NAME), id="a negative part"),
    pytest.param(lambda: parts(-1667.77, 3.4), id="beyond both ends"),
    pytest.param(lambda: parts(1e30, -1e30), id="far beyond both ends"),
    pytest.param(lambda: parts(INF, NAN), id="parts that are not finite"),
    pytest.param(lambda: noise([20.0, 30, 4, INF, NAN, 15, 70]), id="noise"),
    pytest.param(lambda: noise([NAN]), id="noise not known"),
    pytest.param(lambda: noise(spread(60), name=LONG), id="60 layers with long names"),
    pytest.param(lambda: noise(spread(61), name=LONG), id="61 layers"),
    pytest.param(lambda: noise([*spread(199), 1e15]), id="200 layers"),
]


@pytest.fixture(scope="module", params=SPECIMENS)
def drawn(request):
    """A specimen, drawn once for all tests."""
    return request.param()


def test_every_text_lies_inside_the_picture(drawn):
    """Names, ticks, legend, title, caption and numbers are not cut off at any edge."""
    edge = drawn.figure.bbox
    for text in drawn.texts():
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= edge.x1 + 1 and box.y1 <= edge.y1 + 1
        assert inside, text.get_text()


def test_no_two_texts_overlap(drawn):
    """Ticks, labels, caption, title and the numbers of lines each have their own room."""
    boxes = [(text.get_text(), text.get_window_extent().padded(-1.5)) for text in drawn.texts()]
    overlapping = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert overlapping == []


def test_the_picture_has_a_size_that_can_be_read(drawn):
    """Axes keep a height of 1.4 inches, whatever stands around them, and the picture ends at 1700 pixels."""
    assert drawn.axes.get_window_extent().height >= 1.4 * drawn.figure.dpi
    assert drawn.figure.bbox.height <= 1700


def test_colours_are_of_the_palette_that_all_can_tell_apart(drawn):
    """Marks and bars have colours of Okabe & Ito, or white, and no two kinds of marks have one shape."""
    lines = [line for line in drawn.axes.lines if line.get_marker() not in {"None", "|"}]
    found = [line.get_markerfacecolor() for line in lines] + [bar.get_facecolor() for bar in drawn.axes.patches]
    assert all(any(same_color(colour, known) for known in (*OKABE_ITO, "white")) for colour in found)
    shapes = [line.get_marker() for line in lines if not line.get_label().startswith(("_", "γ"))]
    assert len(shapes) == len(set(shapes))


def test_both_losses_are_drawn_where_they_are():
    """One point for each validation, at its epoch, which may be a fraction."""
    epochs = [k / 4 for k in range(20)]
    drawn = curves(FALLING, TURNING, epochs=epochs)
    assert drawn.points("training loss") == (epochs, FALLING)
    assert drawn.points("validation loss") == (epochs, TURNING)
    low, high = drawn.axes.get_ylim()
    assert low < min(FALLING) < max(FALLING) < high


def test_the_best_validation_is_marked():
    """A star stands on it, and the legend has its loss and its epoch."""
    drawn = curves(FALLING, TURNING, epochs=[k + 100 for k in range(20)])
    assert drawn.points("best validation") == ([107], [0.5])
    assert drawn.legend[2] == "best validation: 0.5 in epoch 107"
    assert not curves([1.0, 1.0], [NAN, 1.0], best=0).has("best")


def test_what_is_not_finite_has_a_mark_of_its_own():
    """NaN and infinity leave a gap in the curve and a mark above it; the legend has the first epoch and counts on."""
    drawn = curves([NAN, *FALLING[1:]], SICK)
    heights = drawn.points("validation loss,")[1]
    assert [k for k, height in enumerate(heights) if math.isnan(height)] == [3, 9, 10, 19]
    assert drawn.points("validation loss NaN")[0] == [3, 9, 10, 19]
    assert drawn.points("training loss NaN")[0] == [0]
    assert drawn.legend[-2:] == [
        "training loss NaN or infinite: epoch 0",
        "validation loss NaN or infinite: epoch 3 and 3 more",
    ]
    assert not curves(FALLING, TURNING).has("NaN")


@pytest.mark.parametrize("log", [True, False], ids=["log", "linear"])
def test_marks_of_what_is_not_finite_cover_no_curve(log):
    """The room that they have at the upper edge lies above the largest loss."""
    valid = [100.0 if log else 3.0, NAN, 1.0]
    drawn = curves([2.0, 2.0, NAN], valid)
    top = drawn.axes.transData.transform((0, max(valid[0], 2.0)))[1]
    for kind in ("training loss NaN", "validation loss NaN"):
        line = drawn.line(kind)
        heights = line.get_transform().transform(line.get_xydata())[:, 1]
        assert all(height > top + 8 for height in heights), kind


def test_a_validation_between_two_gaps_is_seen():
    """No line leads to it, so that it has a mark even among so many that not all have one."""
    valid = [1.0] * 300
    valid[100] = valid[102] = NAN
    drawn = curves([1.0] * 300, valid)
    assert 101 in drawn.line("validation loss,").get_markevery()
    assert 101 not in drawn.line("training loss").get_markevery()
    assert len(drawn.line("training loss").get_markevery()) <= 60


@pytest.mark.parametrize(
    ("valid", "scale"),
    [
        pytest.param([1.0, 10.1], "log", id="more than a decade"),
        pytest.param([1.0, 9.9], "linear", id="less than a decade"),
        pytest.param([0.0, 100.0], "linear", id="zero"),
        pytest.param([-1.0, 100.0], "linear", id="negative"),
        pytest.param([1.0, INF], "linear", id="infinity does not count"),
        pytest.param([1e-3, NAN], "log", id="nor does NaN"),
    ],
)
def test_the_axis_is_logarithmic_where_positive_losses_span_a_decade(valid, scale):
    """Finite losses decide, of training and validation together, and the label of the axis says so."""
    drawn = curves([2.0, 2.0], valid)
    assert drawn.axes.get_yscale() == scale
    assert drawn.axes.get_ylabel() == ("loss, logarithmic" if scale == "log" else "loss")


def test_a_flat_loss_looks_flat():
    """A change by a hundredth fills a small part of the height only."""
    low, high = curves([1.0, 1.01], [1.0, 1.01]).axes.get_ylim()
    assert high - low >= 0.2
    assert low < 1.0
    assert high > 1.01


def test_ticks_of_whole_epochs_are_whole():
    """No validation took place in epoch 2.5 where all took place at the end of one."""
    for epochs in (range(1), range(2), range(7), range(0, 4000, 10)):
        drawn = curves([1.0] * len(epochs), [1.0] * len(epochs), epochs=epochs)
        ticks = [label.get_text() for label in drawn.axes.get_xticklabels()]
        assert ticks
        assert all("." not in tick for tick in ticks), ticks


def test_the_verdict_stands_whole_under_the_title():
    """It is wrapped, no word of it is lost, and the title has the whole name of the loss."""
    drawn = curves(FALLING, TURNING, verdict=4 * f"{VERDICT} ", name=NAME)
    lines = drawn.axes.get_title().split("\n")
    assert " ".join(lines).split() == (4 * f"{VERDICT} ").split()
    assert len(lines) > 4
    assert NAME in drawn.figure.get_suptitle().replace("\n", "")
    assert curves(FALLING, TURNING).axes.get_title() == ""


def test_bars_meet_at_the_mean_of_both_orders():
    """γ and β reach from nothing to their share, the other weights from there to the whole."""
    drawn = parts(0.55, 0.75)
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in drawn.axes.patches]
    assert spans == [pytest.approx((0, 0.65)), pytest.approx((0.65, 1))]
    assert drawn.rows == ["γ and β\n65% (55% to 75%)", "other weights\n35% (25% to 45%)"]
    assert drawn.axes.get_ylim() == (1.5, -0.5)
    assert drawn.axes.get_title() == "from 0.4 with the weights of epoch 7 to 0.7 with the weights of the end"


@pytest.mark.parametrize(("first", "last"), [(0.55, 0.75), (0.8, 0.2)], ids=["rising", "falling"])
def test_the_error_bar_reaches_from_one_order_to_the_other(first, last):
    """Each end has the mark of its order, whichever is the larger."""
    drawn = parts(first, last)
    start, end = drawn.axes.containers[-1].lines[2][0].get_segments()[0][:, 0]
    assert [start, end] == pytest.approx(sorted((first, last)))
    assert drawn.points("γ and β moved before")[0] == pytest.approx([first])
    assert drawn.points("γ and β moved after")[0] == pytest.approx([last])
    assert drawn.has(f"before the other weights: {first:.0%}")
    assert drawn.has(f"after the other weights: {last:.0%}")


def test_shares_are_those_of_the_verdict():
    """The picture of the four losses shows the two numbers that the rules judge."""
    losses = Losses([8], stored=[1.0], now=[0.9], best=[0.5], first=[0.7], last=[0.6])
    drawn = Drawn(attribution(0.5, 0.9, 0.7, 0.6, name="val_loss", best_epoch=3))
    found = [drawn.points(f"γ and β moved {order}")[0][0] for order in ("before", "after")]
    assert found == pytest.approx(list(losses.shares))
    assert list(drawn.line("50%").get_xdata()) == [HALF, HALF]


@pytest.mark.parametrize(
    ("first", "last", "limits"),
    [
        pytest.param(0.2, 0.9, (-0.03, 1.03), id="inside"),
        pytest.param(-0.3, 0.1, (-0.33, 1.03), id="a little below"),
        pytest.param(0.8, 3.4, (-0.03, 1.5), id="far above"),
        pytest.param(-1667.77, 3.4, (-0.5, 1.5), id="beyond both"),
    ],
)
def test_the_axis_of_shares_is_clipped_and_the_number_is_not(first, last, limits):
    """What lies beyond is an arrow at the edge that points there, and its label has the true number."""
    drawn = parts(first, last)
    assert drawn.axes.get_xlim() == pytest.approx(limits)
    for share, order in ((first, "before"), (last, "after")):
        line = drawn.line(f"γ and β moved {order}")
        beyond = not -0.5 <= share <= 1.5
        assert line.get_xdata()[0] == pytest.approx(min(max(share, -0.5), 1.5))
        assert (line.get_marker() in "<>") == line.get_label().endswith("beyond the axis") == beyond
        assert f"{share:,.0%}".replace("-", "−") in line.get_label()
        assert not beyond or line.get_marker() == (">" if share > 0 else "<")


@pytest.mark.parametrize(
    ("first", "last", "rows"),
    [
        pytest.param(INF, 0.8, ["γ and β\n80% to ∞", "other weights\n−∞ to 20%"], id="infinite"),
        pytest.param(0.8, NAN, ["γ and β\nnot known", "other weights\nnot known"], id="NaN last"),
        pytest.param(NAN, 0.8, ["γ and β\nnot known", "other weights\nnot known"], id="NaN first"),
        pytest.param(INF, -INF, ["γ and β\n−∞ to ∞", "other weights\n−∞ to ∞"], id="both infinite"),
        pytest.param(0.5, 0.5, ["γ and β\n50%", "other weights\n50%"], id="alike"),
    ],
)
def test_a_share_without_a_finite_mean_has_no_bar(first, last, rows):
    """Orders that are not finite are said in words, and no length is made up for them."""
    drawn = parts(first, last)
    assert drawn.rows == rows
    assert len(drawn.axes.patches) == (2 if math.isfinite(first + last) else 0)
    assert drawn.has("NaN") == math.isnan(first * last)


def test_layers_lie_in_model_order_from_top_to_bottom():
    """Each has its name and its mark in one row, the first at the top."""
    values = [20.0, 30, 4, INF, NAN, 15, 70]
    drawn = noise(values)
    assert drawn.rows == [f"net.{place}.bn" for place in range(7)]
    heights = [label.get_window_extent().y0 for label in drawn.axes.get_yticklabels()]
    assert heights == sorted(heights, reverse=True)
    marks = [(start, drawn.points(start)) for start in ("at least 16", "6 to 16", "below 6")]
    assert dict(marks) == {"at least 16": ([20, 30, 70], [0, 1, 6]), "6 to 16": ([15], [5]), "below 6": ([4], [2])}
    assert drawn.axes.get_xscale() == "log"
    assert drawn.axes.get_title() == "median 25; 2 of 6 below 16"


def test_a_layer_at_a_threshold_is_not_below_it():
    """As the rule has it, 16 effective samples are enough and 6 are not severe."""
    drawn = noise([NOISY, SEVERE])
    assert [entry for entry in drawn.legend if "layer" in entry][2:] == ["at least 16: 1 layer", "6 to 16: 1 layer"]


def test_infinite_and_unknown_noise_stand_at_the_edges():
    """No layer is dropped: infinity is at the right edge, NaN at the left, and the legend counts both."""
    drawn = noise([20.0, INF, NAN, NAN])
    low, high = drawn.axes.get_xlim()
    assert drawn.points("infinite") == ([high], [1])
    assert drawn.points("NaN") == ([low, low], [2, 3])
    assert drawn.legend[-2:] == ["infinite, no noise seen: 1 layer", "NaN, not known: 2 layers"]
    healthy = noise([20.0, 30.0])
    assert not healthy.has("infinite")
    assert not healthy.has("NaN")


@pytest.mark.parametrize("values", [[1e6, 1e7], [1.01, 1.02], [NAN]], ids=["large", "small", "unknown"])
def test_both_thresholds_are_drawn_and_numbered(values):
    """They are in view wherever the layers lie, differ in dashes, and have their numbers at their heads."""
    drawn = noise(values)
    low, high = drawn.axes.get_xlim()
    lines = [drawn.line("16: "), drawn.line("6: ")]
    assert [line.get_xdata()[0] for line in lines] == [NOISY, SEVERE]
    assert low < SEVERE < NOISY < high
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert {text.get_text(): text.xy[0] for text in drawn.axes.texts} == {"16": NOISY, "6": SEVERE}


def test_up_to_sixty_layers_are_named_and_more_are_counted():
    """Long names are cut to 28 characters and stay different; of more layers the rows have numbers."""
    named, counted = noise(spread(60), name=LONG), noise(spread(61), name=LONG)
    assert len(set(named.rows)) == 60
    assert max(map(len, named.rows)) <= 28
    assert [row for row in counted.rows if not row.lstrip("−").isdigit()] == []
    assert {"0", "60"} <= set(counted.rows)
    assert counted.axes.get_ylabel().endswith("counted from 0")
    marked = itertools.chain(*(counted.points(start)[1] for start in ("at least", "6 to", "below")))
    assert sorted(marked) == list(range(61))


def test_a_dollar_sign_is_no_formula():
    """Names and verdicts are shown as they are, whatever matplotlib would make of them."""
    drawn = curves(FALLING, TURNING, name="a$_{$", verdict="from $5 to $6")
    assert drawn.axes.get_title() == r"from \$5 to \$6"
    assert drawn.has(r"a\$_{\$")
    assert r"a\$_{\$" in parts(0.5, 0.6, name="a$_{$").figure.get_suptitle()
    assert noise([1.5, 20.0], name="a${}$_{{").rows == [r"a\$0\$_{", r"a\$1\$_{"]


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        pytest.param(lambda: curves([], []), r"epochs, train, valid .* not 0, got \[0, 0, 0\]", id="no validation"),
        pytest.param(lambda: curves([1.0], [1.0, 2.0]), r"same length, .* got \[2, 1, 2\]", id="lengths"),
        pytest.param(lambda: curves([1.0], [1.0], best=1), "best must be .* 1 validations, .* got 1", id="best"),
        pytest.param(lambda: curves([1.0], [1.0], best=-1), "best must be .* got -1", id="negative best"),
        pytest.param(lambda: parts(0.5, 0.5, after=0.4), "after must be above .* before=0.4 and after=0.4", id="flat"),
        pytest.param(lambda: parts(0.5, 0.5, after=INF), "by a finite number, .* after=inf", id="infinite rise"),
        pytest.param(lambda: parts(0.5, 0.5, before=NAN), "by a finite number, got before=nan", id="NaN"),
        pytest.param(lambda: noise([]), r"layers, values must .* got \[0, 0\]", id="no layer"),
        pytest.param(lambda: noise([3.0, 0.0]), "values must be positive or NaN, got 0.0", id="no samples"),
        pytest.param(
            lambda: effective_samples(["a"], [1.0], noted=6, severe=16), "got severe=16 and noted=6", id="thresholds"
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, said):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=said):
        draw()


@pytest.mark.slow
def test_matplotlib_is_asked_for_late_and_little(tmp_path):
    """Only drawing needs it, and drawing leaves pyplot, with its backend and global figures, alone."""
    script = (
        "import sys; from lightning_bn.verdict_figures import attribution, effective_samples, loss_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "loss_curves([0], [1.0], [1.0], best=0, name='a', verdict='b').savefig('losses.png')\n"
        "attribution(0.1, 0.3, 0.2, 0.2, name='a', best_epoch=0).savefig('attribution.png')\n"
        "effective_samples(['a'], [9.0], noted=16, severe=6).savefig('noise.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
