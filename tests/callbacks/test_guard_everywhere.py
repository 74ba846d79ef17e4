# SPDX-License-Identifier: Apache-2.0
"""NaNGuard under the Trainer's variations, in evaluation, and beside exceptions of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from sick import HERE, LogOfZero, RootAtZero, line_of
from specimens import CLASSES, FEATURES, WIDTH, Healthy, LogOfNegative, loader, network, with_module
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import NaNGuard, NonFiniteError, Severity, read_findings


def plant(*samples, value=float("nan")):
    def change(inputs):
        for sample in samples:
            inputs[sample, 3] = value

    return change


def errors(guard):
    return [(found.rule, found.layer) for found in guard.findings if found.severity is Severity.ERROR]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("build", [LogOfZero, RootAtZero])
def test_other_precisions_name_the_same_line(make_trainer, precision, build):
    """The replay runs under the trainer's precision."""
    guard = NaNGuard()
    data = loader()
    if precision == "64-true":
        data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    with pytest.raises(NonFiniteError):
        make_trainer(guard, precision=precision).fit(build(), data)
    assert guard.findings[0].data["line"] == line_of(build)


def test_the_bad_micro_batch_of_an_accumulation_is_named(make_trainer):
    """The second of three micro-batches holds the sample."""
    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match=r"batch\[0\], sample 4"):
        make_trainer(guard, accumulate_grad_batches=3).fit(Healthy(), loader(plant=plant(12)))
    assert errors(guard) == [("non-finite-input", None)]


def test_bad_gradients_of_a_micro_batch_are_found_in_it(make_trainer):
    """Gradients that are bad before the window closes are traced in the batch that made them."""

    class Second(RootAtZero):
        def term(self, logits, batch):
            return super().term(logits, batch) if self.trainer.fit_loop.batch_idx == 1 else logits.sum() * 0

    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard, accumulate_grad_batches=3).fit(Second(), loader())
    assert guard.findings[0].rule == "invalid-gradient"
    assert guard.findings[0].data["line"] == line_of(RootAtZero)


class Block(nn.Module):
    """Runs its inside under activation checkpointing."""

    def __init__(self, inside, reentrant):
        super().__init__()
        self.inside, self.reentrant = inside, reentrant

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


class Root(nn.Module):
    def forward(self, x):
        return torch.sqrt((x - x.detach()).abs())  # here


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [LogOfNegative, Root])
def test_faults_inside_activation_checkpointing_are_named(make_trainer, reentrant, inside):
    """Forward and backward faults inside a checkpointed block are traced to the line in it."""
    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(Healthy(with_module(Block(inside(), reentrant))), loader())
    (found,) = guard.findings
    assert found.layer == "net.2.inside"
    assert ("log" if inside is LogOfNegative else "sqrt") in found.data["code"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("sick", [True, False])
def test_a_compiled_model_is_replayed_eagerly(make_trainer, whole, sick):
    """The operation inside a compiled part is named; a healthy compiled model raises no error."""
    net = with_module(LogOfNegative() if sick else nn.Identity())
    model = Healthy(net if whole else torch.compile(net, backend="eager"))
    model.log = lambda *_, **__: None
    trained = torch.compile(model, backend="eager") if whole else model
    guard = NaNGuard()
    trainer = make_trainer(guard)
    if sick:
        with pytest.raises(NonFiniteError):
            trainer.fit(trained, loader())
    else:
        trainer.fit(trained, loader())
    assert errors(guard) == ([("invalid-operation", "net.2")] if sick else [])
    assert all(found.rule != "not-watched" for found in guard.findings)  # the modules are heard in a pass of their own


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_part_is_named_by_the_line_that_calls_it(make_trainer):
    """Inside a ScriptModule there are no lines of Python: the operation and the calling line are told."""

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = torch.jit.script(LogOfNegative())

        def forward(self, x):
            return self.part(x)

    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(Healthy(with_module(Caller())), loader())
    (found,) = (entry for entry in guard.findings if entry.severity is Severity.ERROR)
    assert (found.rule, found.data["operation"]) == ("invalid-operation", "log")
    assert found.layer in {"net.2", "net.2.part"}


def test_gradients_that_overflow_under_a_gradient_scaler_are_no_fault(make_trainer):
    """A scale that is too large at first makes infinite gradients and skipped steps, which is how it works."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    guard = NaNGuard()
    trainer = make_trainer(guard, max_epochs=8, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    trainer.fit(Healthy(), loader())
    assert scaler.get_scale() < 2.0**40
    assert guard.findings == []


def test_gradients_that_stay_bad_when_the_scale_is_spent_are_a_fault(make_trainer):
    """NaN that no scale can mend would halve the scale and skip steps for ever: below 1 it is traced."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = NaNGuard()
    trainer = make_trainer(guard, max_epochs=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    with pytest.raises(NonFiniteError):
        trainer.fit(RootAtZero(), loader())
    assert guard.findings[0].data["line"] == line_of(RootAtZero)
    assert trainer.global_step > 2


def test_a_bad_loss_under_a_gradient_scaler_is_a_fault(make_trainer):
    """The loss itself is judged without its scale."""
    guard = NaNGuard()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFiniteError):
        make_trainer(guard, plugins=[plugin]).fit(LogOfZero(), loader())
    assert guard.findings[0].data["line"] == line_of(LogOfZero)


class Returns(Healthy):
    """Returns the loss from validation and test."""

    def validation_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    test_step = validation_step


class LogsOnly(Healthy):
    """Logs it alone."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(self(batch[0]), batch[1]))


@pytest.mark.parametrize("sample", [3, 19])
def test_a_bad_sample_of_validation_is_named(make_trainer, sample):
    """In the first batch and in a later one, by path and sample."""
    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match=rf"batch\[0\], sample {sample % 8}"):
        make_trainer(guard).fit(Returns(), loader(), loader(plant=plant(sample)))
    assert errors(guard) == [("non-finite-input", None)]


def test_a_bad_target_of_validation_is_told_from_a_bad_input(make_trainer):
    """Where no gradients are kept, what the network has computed is known all the same."""

    class Regression(Returns):
        def validation_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self(torch.nan_to_num(batch[0])), batch[0][:, :CLASSES])

    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(Regression(), loader(), loader(plant=plant(19)))
    assert errors(guard) == [("non-finite-target", None)]


def test_the_sanity_check_finds_it_before_the_first_step(make_trainer):
    """Validation comes first there: no weight has changed."""
    guard = NaNGuard()
    trainer = make_trainer(guard, num_sanity_val_steps=2)
    with pytest.raises(NonFiniteError, match="sample 3"):
        trainer.fit(LogsOnly(), loader(), loader(plant=plant(3)))
    assert trainer.global_step == 0


def test_a_loss_that_is_only_logged_is_seen_at_the_end_of_the_loop(make_trainer):
    """A step that returns nothing is judged by what it logged; the last batch is run again."""
    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard, num_sanity_val_steps=0).fit(LogsOnly(), loader(), loader(plant=plant(27)))
    assert errors(guard) == [("non-finite-input", None)]
    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match="val_loss is nan"):
        make_trainer(guard, num_sanity_val_steps=0).fit(LogsOnly(), loader(), loader(plant=plant(11)))
    assert errors(guard) == [("non-finite-loss", None)]


def test_a_training_loss_that_was_logged_as_nan_is_not_laid_to_validation(make_trainer):
    """After a step that was dropped, a healthy validation is silent."""

    class Logs(Healthy):
        def training_step(self, batch, batch_idx):
            loss = self.loss(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

    guard = NaNGuard("skip")
    make_trainer(guard, max_epochs=2).fit(Logs(), loader(plant=plant(27)), loader())
    assert errors(guard) == [("non-finite-input", None)]


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_validate_and_test_alone_are_guarded(make_trainer, loop):
    """``trainer.validate`` and ``trainer.test`` raise the report as a fit does, and it is on disk."""
    guard = NaNGuard()
    trainer = make_trainer(guard)
    with pytest.raises(NonFiniteError, match="sample 3"):
        getattr(trainer, loop)(Returns(), loader(plant=plant(19)), verbose=False)
    assert [found.rule for found in read_findings(trainer.log_dir)] == ["non-finite-input"]
    healthy = NaNGuard()
    getattr(make_trainer(healthy), loop)(Returns(), loader(), verbose=False)
    assert healthy.findings == []


def test_statistics_that_are_nan_in_validation_are_blamed(make_trainer):
    """Validation that is NaN because of running statistics names the layer."""
    net = network()
    net[1].running_mean[2] = float("nan")
    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).validate(Returns(net), loader(), verbose=False)
    assert errors(guard) == [("poisoned-running-statistics", "net.1")]


class Distribution(Healthy):
    """torch.distributions refuses NaN in its arguments with an exception of its own."""

    def training_step(self, batch, batch_idx):
        scores = torch.log(-self(batch[0]).abs()) if self.global_step == self.bad else self(batch[0])  # here
        return -torch.distributions.Categorical(logits=scores, validate_args=True).log_prob(batch[1]).mean()


@pytest.mark.parametrize("bad", [0, 2])
def test_an_exception_of_a_library_is_explained(make_trainer, bad):
    """The exception leaves the fit unchanged, and the operation that made the values is on disk."""
    model = Distribution()
    model.bad = bad
    guard = NaNGuard()
    trainer = make_trainer(guard)
    with pytest.raises(ValueError, match="Categorical"):
        trainer.fit(model, loader())
    (found,) = read_findings(trainer.log_dir)
    assert (found.rule, found.step) == ("invalid-operation", bad)
    assert (Path(found.data["file"]).name, found.data["line"]) == (Path(__file__).name, line_of(Distribution))


def test_a_constant_in_place_of_a_bad_loss_is_explained(make_trainer):
    """The constant's backward fails; what it replaced is named."""

    class Replaces(Healthy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return torch.tensor(0.0) if torch.isnan(loss) else loss

    guard = NaNGuard()
    trainer = make_trainer(guard)
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.fit(Replaces(), loader(plant=plant(17)))
    assert [found.rule for found in read_findings(trainer.log_dir)] == ["non-finite-input"]


@pytest.mark.parametrize("masked", [True, False])
def test_an_unrelated_exception_is_not_explained(make_trainer, masked):
    """An error with finite values, or with NaN that was taken out, is none of the guard's business."""

    class Fails(Healthy):
        def training_step(self, batch, batch_idx):
            loss = self.loss(self(torch.nan_to_num(batch[0])), batch[1])
            if self.global_step == 2:
                raise KeyError("something else")
            return loss

    guard = NaNGuard("warn", ignore=["non-finite-input"])
    with pytest.raises(KeyError):
        make_trainer(guard).fit(Fails(), loader(plant=plant(17) if masked else None))
    assert guard.findings == []


def test_interrupting_a_run_replays_nothing(make_trainer, monkeypatch):
    """Ctrl-C ends at once."""

    class Interrupts(Healthy):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    monkeypatch.setattr("lightning_bn.callbacks.nan_guard.inquire", lambda *_, **__: pytest.fail("replayed"))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(NaNGuard()).fit(Interrupts(), loader())


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_takes_its_batches_itself_says_that_it_cannot_be_replayed(make_trainer):
    """A guard is never silently off: what it saw is reported with the reason why there is no more."""

    class Iterates(Healthy):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return torch.log(self.loss(self(batch[0]), batch[1]) * 0 - 1)

    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match="non-finite-loss"):
        make_trainer(guard).fit(Iterates(), loader())
    assert any("dataloader_iter" in found.evidence for found in guard.findings)
    assert guard.findings[0].rule == "not-watched"  # said at the start, not only when it is needed


def test_a_raw_backward_is_watched_by_its_gradients(make_trainer):
    """With ``loss.backward()`` in the user's own hands the gradients tell, before the weights change."""

    class Raw(Healthy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx).backward()
            self.optimizers().step()

    model = Raw(with_module(LogOfNegative()))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(model, loader())
    assert errors(guard) == [("invalid-operation", "net.2")]
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


def test_a_second_optimizer_with_sparse_gradients_is_watched(make_trainer):
    """Sparse gradients are judged by their values."""

    class Sparse(Healthy):
        automatic_optimization = False

        def __init__(self, sick):
            super().__init__()
            self.table, self.sick = nn.Embedding(CLASSES, WIDTH, sparse=True), sick

        def training_step(self, batch, batch_idx):
            rows = self.table(batch[1]).sum(1)
            self.manual_backward((torch.sqrt(rows * 0) if self.sick else rows).sum())
            self.optimizers().step()

        def configure_optimizers(self):
            return torch.optim.SparseAdam(self.table.parameters())

    for sick in (True, False):
        guard = NaNGuard("warn")
        make_trainer(guard).fit(Sparse(sick), loader())
        assert bool(errors(guard)) is sick
        assert not guard.off


def test_the_guard_reads_nothing_on_the_host_in_the_forward_pass(make_trainer):
    """From the start of the step to backward no value is read, except in the first one."""

    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
            return func(*args, **(kwargs or {}))

    class Watched(Healthy):
        def training_step(self, batch, batch_idx):
            with Reads() if self.global_step else torch.enable_grad():
                return self.loss(self(batch[0]), batch[1])

    guard = NaNGuard()
    make_trainer(guard, max_epochs=2).fit(Watched(), loader())
    assert not guard.off


def test_the_report_on_the_first_pass_has_a_table_over_depth_and_a_figure(make_trainer):
    """Standard deviation, largest value and headroom, layer by layer, under tags of their own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    trainer = make_trainer(NaNGuard(), num_sanity_val_steps=1)
    trainer.fit(Healthy(), loader(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    for tag in ("bn_first_pass", "bn_first_validation"):
        text = events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| layer | std | largest abs | headroom |" in text
        assert "| `net.0` |" in text
        assert events.Images(f"{tag}/signal")


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (0.3, True)])
def test_a_coming_overflow_is_warned_of(make_trainer, scale, warns):
    """A float16 output of 30 % of the range is a warning before anything is infinite; a usual one is none."""

    class Half(Healthy):
        def forward(self, x):
            return self.net(x.half())

    net = network(norm=False).half()
    if warns:
        with torch.no_grad():
            x = loader().dataset.tensors[0][:8].half()
            net[0].weight.mul_(scale * 65504 / net[0](x).abs().max())
            net[2].weight.mul_(1e-5)
    guard = NaNGuard()
    make_trainer(guard, max_steps=1, max_epochs=-1).fit(Half(net), loader())
    assert [found.rule for found in guard.findings] == (["little-headroom"] if warns else [])


def test_a_file_beside_the_sick_models_is_named(make_trainer):
    """The file that is told is the user's own."""
    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(LogOfZero(), loader())
    assert Path(guard.findings[0].data["file"]).resolve() == Path(HERE).resolve()
    assert guard.findings[0].data["inputs"][0]["shape"] == [8, CLASSES]
    assert FEATURES > CLASSES
