# SPDX-License-Identifier: Apache-2.0
"""PreflightAudit says before the first step what is planted, says nothing of healthy projects, and touches nothing."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from harm import Busy, Manual, assert_identical, everything_after
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from processes import in_two_processes
from specimens import (
    CLASSES,
    FEATURES,
    WIDTH,
    BuiltInConfigureModel,
    BuiltInSetup,
    Healthy,
    loader,
    network,
)
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from lightning_bn import PreflightAudit, Severity, read_findings
from lightning_bn.callbacks.preflight_audit import audit
from lightning_bn.demo import DigitsMLP, DigitsResNet
from lightning_bn.norms import find_batchnorm, residual_closing
from lightning_bn.preflight import Loader, Run
from lightning_bn.rules import SLUGS

pytestmark = [
    # Scripting announces its own end, and so does what the compiler imports.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # Lightning counts them too; some are here on purpose.
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]


class EndsAtOnce(Callback):
    """Lets a fit end before its first step: what was said until then was said before it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise KeyboardInterrupt


def said(make_trainer, model, data=None, *others, ignore=None, **options):
    """What the audit says before the first step of a fit of 15 epochs."""
    monitor = PreflightAudit(ignore=ignore)
    trainer = make_trainer(*others, monitor, EndsAtOnce(), **{"max_epochs": 15, **options})
    with pytest.raises(SystemExit):
        trainer.fit(model, loader() if data is None else data)
    assert trainer.global_step == 0
    assert not monitor.off
    return monitor.findings


def faults(findings):
    return [finding.rule for finding in findings if finding.severity is not Severity.INFO]


def notes(findings):
    return [finding.rule for finding in findings if finding.severity is Severity.INFO]


def with_norms(change, model=None):
    model = model or Healthy()
    for norm in find_batchnorm(model).values():
        with torch.no_grad():
            change(norm)
    return model


def zero(norm):
    norm.weight.zero_()


class Groups(Healthy):
    """γ and β in a parameter group of their own."""

    def __init__(self, kind=torch.optim.SGD, net=None, **group):
        super().__init__(net or network(width=64))
        self.kind, self.group = kind, group

    def configure_optimizers(self):
        affine = [x for norm in find_batchnorm(self).values() for x in norm.parameters()]
        rest = [x for x in self.parameters() if not any(x is y for y in affine)]
        return self.kind([{"params": rest, "weight_decay": 0.0}, {"params": affine, **self.group}], lr=1e-3)


class AffineOnly(Healthy):
    def configure_optimizers(self):
        return torch.optim.SGD([x for norm in find_batchnorm(self).values() for x in norm.parameters()], 1e-2)


class EvalEachEpoch(Healthy):
    def on_train_epoch_start(self):
        for norm in find_batchnorm(self).values():
            norm.eval()


class Freezes(BaseFinetuning):
    """Freezes all but the head, BatchNorm with it."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[:-1], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


class Filtered(Healthy):
    def configure_optimizers(self):
        return torch.optim.SGD([x for x in self.parameters() if x.requires_grad], 1e-2)


class Backbone(Filtered):
    """What BackboneFinetuning asks for."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:-1], self.net[-1]

    def forward(self, x):
        return self.head(self.backbone(x))


def dropped(rate):
    net = network()
    net.insert(3, nn.Dropout(rate))
    return Healthy(net)


def images(size=32, batch_size=8, side=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(size, 1, side, side, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(size) % 10), batch_size)


SICK = {
    # planted: model, loader, rules that are warned of or worse, words of the first
    "batch of 1": (Healthy, lambda: loader(batch_size=1), ["one-value-per-channel"], "every batch has 1 sample"),
    "last batch of 1": (Healthy, lambda: loader(17, 8), ["one-value-per-channel"], "(the others have 8) has 1 sample"),
    "batch of 2": (Healthy, lambda: loader(batch_size=2), ["few-values-per-channel"], "from 2 values"),
    "eval mode": (lambda: with_norms(nn.Module.eval), loader, ["batchnorm-in-eval-mode"], "nothing is normalised"),
    "eval mode at each epoch": (EvalEachEpoch, loader, ["batchnorm-in-eval-mode"], "net.1 and net.4 are in eval mode"),
    "flag taken": (
        lambda: with_norms(lambda norm: setattr(norm, "track_running_stats", False)),
        loader,
        ["untracked-statistics"],
        "by stored statistics in evaluation",
    ),
    "momentum of Keras": (
        lambda: with_norms(lambda norm: setattr(norm, "momentum", 0.9)),
        loader,
        ["large-momentum"],
        "momentum 0.9 in net.1 and net.4",
    ),
    "momentum too small": (
        lambda: with_norms(lambda norm: setattr(norm, "momentum", 0.001)),
        loader,
        ["small-momentum"],
        "after the 60 batches of this fit 94%",
    ),
    "γ = β = 0": (lambda: with_norms(zero), loader, ["zero-gamma"], "γ = β = 0 in net.1 and net.4"),
    "dropout in front": (lambda: dropped(0.5), loader, ["dropout-before-batchnorm"], "net.3 drops 50%"),
    "γ and β 1000 times as fast": (lambda: Groups(lr=1.0), loader, ["fast-affine"], "1,000 times as fast"),
    "γ decays": (
        lambda: Groups(torch.optim.AdamW, weight_decay=100.0),
        loader,
        ["decayed-gamma"],
        "bounds γ by 1 / 100",
    ),
}


@pytest.mark.parametrize(("build", "data", "rules", "words"), SICK.values(), ids=SICK)
def test_exactly_what_is_planted_is_said_before_the_first_step(make_trainer, build, data, rules, words):
    """Each planted fault is named with its numbers and one action, and no other fault is."""
    findings = said(make_trainer, build(), data())
    found = [finding for finding in findings if finding.severity is not Severity.INFO]
    assert [finding.rule for finding in found] == rules
    assert words in found[0].evidence
    assert found[0].advice


def test_the_last_batch_of_one_sample_ends_the_fit_as_it_was_said(make_trainer):
    """Left as it is torch raises in the last batch; with ``drop_last`` nothing is said and all ends well."""
    monitor = PreflightAudit()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        make_trainer(monitor).fit(Healthy(), loader(17, 8))
    assert faults(monitor.findings) == ["one-value-per-channel"]
    assert monitor.findings[0].severity is Severity.ERROR
    dropping = DataLoader(loader(17).dataset, 8, drop_last=True)
    make_trainer(monitor := PreflightAudit()).fit(Healthy(), dropping)
    assert faults(monitor.findings) == []


class TwoViews(Healthy):
    """Joins two views of each sample in front of the network, as contrastive learning does."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(torch.cat([x, x + 0.1])), torch.cat([y, y]))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: loader(17, 8), id="last batch of 1"),
        pytest.param(lambda: loader(batch_size=1), id="batches of 1"),
        pytest.param(lambda: loader(batch_size=2), id="batches of 2"),
    ],
)
def test_rows_that_the_step_makes_of_each_sample_are_counted(make_trainer, data):
    """Two views of each sample are two rows: such a fit ends well, and nothing was foretold."""
    monitor = PreflightAudit()
    make_trainer(monitor).fit(TwoViews(), data())
    assert faults(monitor.findings) == []
    assert "bias-before-batchnorm" in notes(monitor.findings)


def test_a_batch_that_begins_with_something_else_is_counted_by_the_loader(make_trainer):
    """A tensor of one value in front of the samples does not make rows of them look like several of each."""

    class Weighed(Healthy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[1:], batch_idx)

    def collate(samples):
        x, y = zip(*samples, strict=True)
        return torch.ones(1), torch.stack(x), torch.stack(y)

    monitor = PreflightAudit()
    data = DataLoader(loader(17).dataset, 8, collate_fn=collate)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        make_trainer(monitor).fit(Weighed(), data)
    assert "one-value-per-channel" in [finding.rule for finding in monitor.findings]


@pytest.mark.parametrize("size", [1, 2])
def test_what_waited_for_the_first_pass_is_said_before_a_weight_moves(make_trainer, size):
    """Also where the first forward pass fails as it was foreseen."""

    class Notes(Callback):
        seen = None

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen = self.seen or [finding.rule for finding in monitor.findings]

    monitor, notes = PreflightAudit(), Notes()
    fit = partial(make_trainer(monitor, notes).fit, Healthy(), loader(batch_size=size))
    if size == 1:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            fit()
        assert "one-value-per-channel" in [finding.rule for finding in monitor.findings]
    else:
        fit()
        assert "few-values-per-channel" in notes.seen


def test_a_short_batch_that_the_trainer_never_reaches_is_no_fault(make_trainer):
    """``limit_train_batches`` cuts the epoch before the batch of one sample."""
    assert faults(said(make_trainer, Healthy(), loader(17, 8), limit_train_batches=2)) == []
    assert faults(said(make_trainer, Healthy(), loader(17, 8), limit_train_batches=3)) == ["one-value-per-channel"]


def test_lightnings_freeze_is_warned_of_and_its_way_for_batchnorm_is_not(make_trainer):
    """``freeze(train_bn=False)`` leaves statistics untracked; BackboneFinetuning, which trains BatchNorm, does not."""
    assert faults(said(make_trainer, Filtered(), None, Freezes())) == ["untracked-statistics"]
    assert faults(said(make_trainer, Backbone(), None, BackboneFinetuning())) == []


def closers_at_zero():
    model = DigitsResNet("batch")
    for name in residual_closing(model).closing:
        nn.init.zeros_(model.get_submodule(name).weight)
    return model


def pretrained(mode):
    """A network with learned statistics."""
    model = with_norms(lambda norm: norm.running_mean.add_(1))
    for norm in find_batchnorm(model).values():
        norm.train(mode == "train").requires_grad_(mode != "frozen")
    return model


class Pair(Healthy):
    """A student, and a frozen teacher in eval mode that was never trained."""

    def __init__(self):
        super().__init__()
        self.teacher = network().eval().requires_grad_(False)

    def forward(self, x):
        return self.net(x) + self.teacher(x)


class Transformer(LightningModule):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.LazyLinear(4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0].unsqueeze(2)), batch[1])

    def configure_optimizers(self):
        self.net(torch.zeros(2, FEATURES, 1))
        return torch.optim.SGD(self.parameters(), 0.01)


HEALTHY = {
    "perceptron": (Healthy, loader, ["few-values-per-channel", "bias-before-batchnorm"]),
    "perceptron, batch of 32": (Healthy, lambda: loader(64, 32), ["bias-before-batchnorm"]),
    "perceptron, no norm": (lambda: Healthy(network(norm=False)), lambda: loader(batch_size=1), []),
    "dropout 0.3 in front": (lambda: dropped(0.3), lambda: loader(64, 32), ["bias-before-batchnorm"]),
    "dropout behind": (
        lambda: Healthy(nn.Sequential(network()[:-1], nn.Dropout(0.5), network()[-1])),
        lambda: loader(64, 32),
        ["bias-before-batchnorm"],
    ),
    "residual network": (DigitsResNet, images, []),
    "residual network, batch of 2": (DigitsResNet, lambda: images(batch_size=2), []),
    "residual network, last batch of 1": (DigitsResNet, lambda: images(17), []),
    "residual network, batch of 1": (DigitsResNet, lambda: images(batch_size=1), ["single-sample-statistics"]),
    "γ = 0 in residual closers": (closers_at_zero, images, []),
    "momentum None": (
        lambda: with_norms(lambda norm: setattr(norm, "momentum", None)),
        lambda: loader(64, 32),
        ["bias-before-batchnorm"],
    ),
    "no running statistics": (
        lambda: Healthy(nn.Sequential(nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16, track_running_stats=False))),
        lambda: loader(64, 32),
        [],
    ),
    "learned statistics kept": (lambda: pretrained("eval"), lambda: loader(64, 32), ["batchnorm-in-eval-mode"]),
    "BatchNorm frozen": (lambda: pretrained("frozen"), lambda: loader(64, 32), []),
    "learned statistics trained on": (
        lambda: with_norms(lambda norm: setattr(norm, "momentum", 0.001), pretrained("train")),
        lambda: loader(64, 32),
        ["bias-before-batchnorm"],
    ),
    "frozen teacher": (Pair, lambda: loader(64, 32), ["bias-before-batchnorm"]),
    "groups of one rate": (lambda: Groups(weight_decay=1e-4), lambda: loader(64, 32), ["bias-before-batchnorm"]),
    "γ and β alone": (
        AffineOnly,
        lambda: loader(64, 32),
        ["bias-before-batchnorm", "affine-outnumbers-samples"],
    ),
    "transformer": (Transformer, loader, []),
}


@pytest.mark.parametrize(("build", "data", "expected"), HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_project_gets_notes_at_most(make_trainer, build, data, expected):
    """No warning and no error, and of the notes exactly those that are true."""
    findings = said(make_trainer, build(), data())
    assert faults(findings) == []
    assert notes(findings) == expected


class NeverIterated:
    """A loader of which nothing but attributes may be used."""

    def __init__(self, **attributes):
        vars(self).update(attributes)
        self.iterations = 0

    def __iter__(self):
        self.iterations += 1
        return iter(loader(batch_size=2))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(loader(batch_size=None).dataset)


class Custom(BatchSampler):
    """Batches of 5, 1, 5, 1, which its ``batch_size`` does not tell."""

    def __iter__(self):
        return iter([[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10]])

    def __len__(self):
        return 3


DATA = loader().dataset
LOADERS = {
    # loader, rules of the faults, rules of the notes beside bias-before-batchnorm
    "no attributes": (lambda: NeverIterated(), ["few-values-per-channel"], []),
    "batch size told": (lambda: NeverIterated(batch_size=2), ["few-values-per-channel"], []),
    "batch size told, other rows": (lambda: NeverIterated(batch_size=1), [], ["one-value-per-channel"]),
    "stream": (lambda: DataLoader(Stream(), 2), ["few-values-per-channel"], []),
    "stream of samples": (lambda: DataLoader(DATA, batch_size=None), [], []),
    "batch sampler of one's own": (
        lambda: DataLoader(DATA, batch_sampler=Custom(range(16), 16, drop_last=False)),
        [],
        [],
    ),
    "two loaders": (lambda: {"a": loader(17), "b": [loader(16)]}, [], ["one-value-per-channel"]),
}


class Anything(Healthy):
    """Trains on whatever the batch is."""

    def training_step(self, batch, batch_idx):
        return self.net(torch.randn(8, FEATURES)).sum()


@pytest.mark.parametrize(("build", "expected", "noted"), LOADERS.values(), ids=LOADERS)
def test_every_kind_of_loader_is_taken_by_its_attributes(make_trainer, build, expected, noted):
    """What a loader does not tell is not guessed, and no fit comes to harm."""
    findings = said(make_trainer, Anything(), build())
    assert faults(findings) == expected
    assert [rule for rule in notes(findings) if rule != "bias-before-batchnorm"] == noted


def test_a_loader_is_iterated_no_more_often_than_without_the_audit(make_trainer):
    """Each pass is Lightning's own."""
    counts = []
    for callbacks in ([], [PreflightAudit()]):
        data = NeverIterated(batch_size=2)
        make_trainer(*callbacks, max_epochs=2).fit(Healthy(), data)
        counts.append(data.iterations)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("build", [BuiltInSetup, BuiltInConfigureModel], ids=["setup", "configure_model"])
def test_layers_that_are_built_late_are_there(make_trainer, build):
    """The audit looks when all layers exist."""
    assert faults(said(make_trainer, build(), loader(17))) == ["one-value-per-channel"]


def test_a_checkpoint_is_restored_before_the_audit(make_trainer, tmp_path):
    """What counts is what is trained: a γ of 0 that the checkpoint replaces is no fault."""
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Healthy(), loader(64, 32))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    monitor = PreflightAudit()
    make_trainer(monitor, max_epochs=2).fit(with_norms(zero), loader(64, 32), ckpt_path=tmp_path / "first.ckpt")
    assert faults(monitor.findings) == []


def test_a_resumed_run_does_not_repeat_what_was_said(make_trainer, tmp_path):
    """What the first run said is in its checkpoint; a new fit of the same audit says it again."""
    trainer = make_trainer(monitor := PreflightAudit(), max_epochs=1)
    trainer.fit(with_norms(zero), loader(64, 32))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    make_trainer(resumed := PreflightAudit(), max_epochs=2).fit(
        Healthy(), loader(64, 32), ckpt_path=tmp_path / "first.ckpt", weights_only=True
    )
    assert resumed.findings == []
    make_trainer(monitor, max_epochs=1).fit(with_norms(zero), loader(64, 32))
    assert faults(monitor.findings) == ["zero-gamma", "zero-gamma"]


def test_each_thing_is_said_once_in_a_fit_and_is_on_disk(make_trainer):
    """Several epochs, one finding each, in the file as well."""
    trainer = make_trainer(monitor := PreflightAudit(), max_epochs=3)
    trainer.fit(with_norms(zero), loader(64, 32))
    assert [finding.rule for finding in monitor.findings] == ["zero-gamma", "bias-before-batchnorm"]
    assert read_findings(trainer.log_dir) == monitor.findings
    assert {(finding.epoch, finding.step) for finding in monitor.findings} == {(0, 0)}


def test_a_rule_can_be_silenced(make_trainer):
    """``ignore`` takes away what it names and nothing else."""
    model = with_norms(zero)
    assert [f.rule for f in said(make_trainer, model, loader(64, 32), ignore=["bias-before-batchnorm"])] == [
        "zero-gamma"
    ]


def test_the_docstring_lists_the_rules_that_the_audit_may_report():
    """Every rule that the module of the audit imports is named where ``ignore`` is explained, and no other."""
    text = " ".join(PreflightAudit.__doc__.split("out of", 1)[1].split("Raises", 1)[0].split()).rstrip(".")
    listed = set(text.replace(" ", "").split(","))
    source = Path(sys.modules[PreflightAudit.__module__].__file__).read_text()
    used = {slug for slug in SLUGS if f"lightning_bn.rules.{slug.replace('-', '_')} " in source}
    assert listed == used


def test_lazy_layers_are_said_to_be_out_of_sight(make_trainer):
    """Their γ, β and statistics do not exist yet; the rest is looked at, and the fit goes on."""
    net = nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(CLASSES))

    class Lazy(Healthy):
        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)

    monitor = PreflightAudit()
    make_trainer(monitor).fit(Lazy(net), loader(64, 32))
    assert [finding.rule for finding in monitor.findings] == ["not-watched", "not-watched"]
    assert "lazy" in monitor.findings[0].evidence
    assert not monitor.off


RUN = Run((Loader(8, 8, 64),), ((8, FEATURES), (8,)))


def test_compiled_parts_are_looked_into():
    """A part behind ``torch.compile`` is traced like any other."""
    model = nn.Sequential(torch.compile(with_norms(zero, network()), backend="eager"))
    found = {finding.rule: finding for finding in audit(model, [], RUN) if finding}
    assert found["zero-gamma"].data["layers"] == ["0.1", "0.4"]
    assert "bias-before-batchnorm" in found


def test_scripted_layers_are_said_to_be_out_of_sight():
    """BatchNorm in a ScriptModule cannot be read, and an info says so."""
    findings = [finding for finding in audit(nn.Sequential(torch.jit.script(network())), [], RUN) if finding]
    assert [finding.rule for finding in findings] == ["not-watched", "not-watched"]
    assert all("ScriptModule" in finding.evidence for finding in findings)


def test_a_forward_that_cannot_be_traced_is_said_to_be_out_of_sight(make_trainer):
    """What stands in front of BatchNorm is not known there: γ = 0 is a note, since it may close a branch."""

    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.out = nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            y = self.bn(self.a(x))
            return self.out(y + self.a(x) if x.sum() > -1e9 else y)

    findings = said(make_trainer, with_norms(zero, Healthy(Depends())), loader(64, 32))
    assert faults(findings) == []
    assert notes(findings) == ["zero-gamma", "not-watched"]
    assert "was not seen" in findings[0].evidence


def test_sums_outside_of_any_forward_are_not_taken_for_none(make_trainer):
    """A branch that ``training_step`` itself closes is not seen: γ = 0 there is a note."""

    class InTheStep(LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.out = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)

        def training_step(self, batch, batch_idx):
            return self.out(batch[0] + self.bn(self.a(batch[0]))).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    assert faults(said(make_trainer, with_norms(zero, InTheStep()), loader(64, 32))) == []


def test_an_optimizer_that_holds_other_tensors_is_said():
    """Sharded or flattened parameters are not those of the model, and nothing is concluded from them."""
    other = torch.optim.SGD([nn.Parameter(torch.ones(9))], 0.1)
    findings = [finding for finding in audit(network(), [other], RUN) if finding]
    assert "the optimizer holds no parameter of the model" in findings[-1].evidence


@pytest.mark.parametrize("processes", [1, 2])
def test_synchronised_layers_count_the_samples_of_all_processes(processes):
    """What one process has is few; what is pooled over processes is what counts, and unpooled layers are told."""
    run = Run((Loader(4, 4, 64),), ((4, FEATURES), (4,)), processes)
    apart = [finding for finding in audit(network(), [], run) if finding]
    pooled = [finding for finding in audit(nn.SyncBatchNorm.convert_sync_batchnorm(network()), [], run) if finding]
    rule = "unsynchronised-batchnorm" if processes > 1 else "few-values-per-channel"
    assert (apart[0].rule, apart[0].severity) == (rule, Severity.WARNING)
    assert (pooled[0].rule, pooled[0].data["values"]) == ("few-values-per-channel", 4 * processes)
    assert pooled[0].severity is (Severity.INFO if processes > 1 else Severity.WARNING)


def test_convolutions_on_several_processes_are_noted_on_tiny_batches_alone():
    """Up to 4 samples a process a note, never a warning; above nothing."""
    model = DigitsResNet("batch").net
    for size, expected in ((4, ["unsynchronised-batchnorm"]), (5, [])):
        run = Run((Loader(size, size, 64),), ((size, 1, 8, 8), (size,)), 8)
        findings = [finding for finding in audit(model, [], run) if finding]
        assert [finding.rule for finding in findings] == expected
        assert faults(findings) == []


def test_one_sample_on_each_process_is_enough_where_statistics_are_pooled():
    """SyncBatchNorm on two processes has two values for each channel: no error is foretold."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    run = Run((Loader(1, 1, 64),), ((1, FEATURES), (1,)), 2)
    assert faults([finding for finding in audit(model, [], run) if finding]) == ["few-values-per-channel"]


def test_on_one_process_synchronised_layers_are_like_others():
    """Nothing is pooled there: SyncBatchNorm takes one sample no more than BatchNorm does."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    run = Run((Loader(1, 1, 64),), ((1, FEATURES), (1,)))
    assert faults([finding for finding in audit(model, [], run) if finding]) == ["one-value-per-channel"]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, FEATURES))


def test_an_error_of_the_audit_is_reported_and_training_goes_on(make_trainer, monkeypatch):
    """The monitor says what went wrong once, is off, and the fit ends as planned."""

    def broken(_):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("lightning_bn.callbacks.preflight_audit.surroundings", broken)
    trainer = make_trainer(monitor := PreflightAudit())
    trainer.fit(Healthy(), loader())
    assert [finding.rule for finding in monitor.findings] == ["monitor-failed"]
    assert trainer.global_step == 4


class TakesFirst(Healthy):
    """Trains on the batch of one of two loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "data"),
    [
        pytest.param(Busy, loader, id="every random stream"),
        pytest.param(Manual, loader, id="two optimizers, by hand"),
        pytest.param(partial(with_norms, zero, None), loader, id="with a fault"),
        pytest.param(lambda: DigitsMLP("batch"), images, id="demo perceptron"),
        pytest.param(closers_at_zero, images, id="γ = 0 in residual closers"),
        pytest.param(TakesFirst, lambda: {"a": loader(), "b": loader(17)}, id="two loaders"),
    ],
)
def test_training_with_the_audit_is_bit_identical(make_trainer, build, data):
    """Weights, buffers, optimizer states, random streams and metrics are those of plain training."""

    def run(callbacks):
        seed_everything(3)
        model = build()
        trainer = make_trainer(*callbacks, max_epochs=2)
        trainer.fit(model, data())
        return everything_after(trainer, model)

    assert_identical(run([]), run([PreflightAudit()]))


SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from specimens import Healthy, loader
from lightning_bn import PreflightAudit
from lightning_bn.callbacks.base import shielded

RANK, (SCENARIO, ROOT) = int(os.environ.get("LOCAL_RANK", "0")), sys.argv[1:]


class Own(Healthy):
    def train_dataloader(self):
        return loader(17 if RANK and SCENARIO == "rank 1 is shorter" else 24, 8)


class Audit(PreflightAudit):
    @shielded
    def _look(self, *args):
        assert not (RANK and SCENARIO == "rank 1 fails"), "a bug of ours"
        return super()._look(*args)


class StopsAfterOneStep(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = True


monitor = Audit()
trainer = Trainer(
    accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), use_distributed_sampler=False,
    limit_train_batches=3, max_epochs=5, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, logger=False, default_root_dir=ROOT, callbacks=[monitor, StopsAfterOneStep()],
)
trainer.fit(Own())
found = [[finding.rule, finding.severity.value, finding.data.get("rank")] for finding in monitor.findings]
with open(f"{ROOT}/rank{RANK}.json", "w") as file:
    json.dump({"steps": trainer.global_step, "found": found}, file)
"""
COMMON = [["unsynchronised-batchnorm", "info", None], ["bias-before-batchnorm", "info", None]]
RANKS = {
    "equal ranks": (COMMON, []),
    "rank 1 is shorter": ([*COMMON, ["one-value-per-channel", "error", 1]], []),
    "rank 1 fails": (COMMON, [["monitor-failed", "warning", 1]]),
}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", RANKS)
def test_two_processes_report_once_and_together(tmp_path, scenario):
    """The first rank says what it sees, and what only the other one sees with its rank; none waits for the other."""
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = in_two_processes(tmp_path / "script.py", scenario, tmp_path, root=tmp_path)
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    assert len(reports) == 2, printed
    assert [report["steps"] for report in reports] == [1, 1]
    assert tuple(report["found"] for report in reports) == RANKS[scenario]
