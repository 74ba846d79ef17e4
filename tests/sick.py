# SPDX-License-Identifier: Apache-2.0
"""Models with one planted non-finite fault each, the line that plants it marked, and healthy twins."""

from __future__ import annotations

import inspect

import torch
from specimens import CLASSES, FEATURES, WIDTH, Healthy, LogOfNegative, network, with_module
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

HERE = __file__


def line_of(owner):
    """The number of the line of this file that plants the fault of a class or function: the one marked ``here``."""
    lines, start = inspect.getsourcelines(owner)
    (place,) = [start + k for k, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return place


class WithLoss(Healthy):
    """Adds a term to the loss."""

    def term(self, logits, batch):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return self.loss(logits, batch[1]) + self.term(logits, batch)


class LogOfZero(WithLoss):
    def term(self, logits, batch):
        p = torch.softmax(logits, 1).clone()
        p[:, 0] = 0
        return -(torch.log(p) * F.one_hot(batch[1], CLASSES)).sum()  # here


class RootAtZero(WithLoss):
    """Forward is clean; the slope of the root at 0 is infinite."""

    def term(self, logits, batch):
        d = logits[:1] - logits
        return 0.01 * torch.sqrt((d * d).sum(1)).mean()  # here


class RootBesideZero(WithLoss):
    """The healthy twin."""

    def term(self, logits, batch):
        d = logits[:1] - logits
        return 0.01 * torch.sqrt((d * d).sum(1) + 1e-6).mean()


class Masked(WithLoss):
    """``torch.where`` hides NaN from the loss, but not from the gradients."""

    def term(self, logits, batch):
        roots = torch.sqrt(logits)  # here
        return torch.where(logits > 0, roots, torch.zeros_like(roots)).mean()


class MaskedBefore(WithLoss):
    """The healthy twin."""

    def term(self, logits, batch):
        safe = torch.where(logits > 0, logits, torch.ones_like(logits))
        return torch.where(logits > 0, torch.sqrt(safe), torch.zeros_like(safe)).mean()


class Quotient(WithLoss):
    def term(self, logits, batch):
        return (logits / (logits - logits.detach())).mean()  # here


class Exponential(WithLoss):
    def term(self, logits, batch):
        return torch.exp(100 + 1e3 * logits.abs()).mean()  # here


class EmptySelection(WithLoss):
    def term(self, logits, batch):
        return logits[batch[1] > CLASSES].mean()  # here


class AllIgnored(Healthy):
    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return F.cross_entropy(logits, torch.full_like(batch[1], -100))  # here


class AllOfARowMasked(WithLoss):
    def term(self, logits, batch):
        scores = logits.masked_fill(batch[1][:, None] == 0, float("-inf"))
        return torch.softmax(scores, 1).sum()  # here


class SomeMasked(WithLoss):
    """The healthy twin."""

    def term(self, logits, batch):
        scores = logits.masked_fill(F.one_hot(batch[1], CLASSES).bool(), float("-inf"))
        return torch.softmax(scores, 1).sum()


class OwnFunction(torch.autograd.Function):
    """A clamp whose backward divides by 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (x - x)  # here


class CallsOwnFunction(WithLoss):
    def term(self, logits, batch):
        return OwnFunction.apply(logits).mean()


class InPlace(nn.Module):
    def forward(self, x):
        x = x.clone()
        x.add_(0.0).sqrt_()  # here
        return x


class Negated(nn.Module):
    """Ahead of a root: everything becomes negative."""

    def forward(self, x):
        return -x.abs() - 1


class Convolutions(Healthy):
    """Convolution, norm and a reciprocal of dead units between them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8)
            self.second = nn.Conv1d(8, 4, 3)
            self.head = nn.Linear(4 * (FEATURES - 4), CLASSES)

        def forward(self, x):
            x = self.norm(self.first(x[:, None])).relu()
            x = self.second(x.reciprocal())  # here
            return self.head(x.flatten(1))

    def __init__(self):
        super().__init__(self.Net())


class Attention(Healthy):
    """Every key of one sample is padding."""

    class Net(nn.Module):
        def __init__(self, pad):
            super().__init__()
            self.embed, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.pad = pad

        def forward(self, x):
            z = self.embed(x)[:, None].expand(-1, 5, -1)
            mask = torch.zeros(len(x), 5, dtype=torch.bool)
            mask[2, : self.pad] = True
            out, _ = self.attention(z, z, z, key_padding_mask=mask)  # here
            return self.head(out.mean(1))

    def __init__(self, pad=5):
        super().__init__(self.Net(pad))


class Recurrent(Healthy):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(FEATURES, WIDTH, batch_first=True), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            out, _ = self.rnn(x[:, None].expand(-1, 3, -1))
            return self.head(torch.log(out[:, -1]))  # here

    def __init__(self):
        super().__init__(self.Net())


class Gan(Healthy):
    """Two optimizers; the generator's loss takes the logarithm of 0."""

    automatic_optimization = False

    def __init__(self, sick=True):
        super().__init__()
        self.generator, self.discriminator = nn.Linear(4, FEATURES), nn.Linear(FEATURES, 1)
        self.sick = sick

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        noise = torch.randn(len(batch[0]), 4)
        real, fake = self.discriminator(batch[0]), self.discriminator(self.generator(noise).detach())
        d.zero_grad()
        self.manual_backward(F.softplus(-real).mean() + F.softplus(fake).mean())
        d.step()
        p = torch.sigmoid(self.discriminator(self.generator(noise)))
        p = p * 0 if self.sick else p
        g.zero_grad()
        loss = -torch.log(p).mean()  # here
        self.manual_backward(loss)
        g.step()
        self.log("g_loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.generator, self.discriminator)]


class BadTarget(Healthy):
    """A regression whose target holds NaN."""

    def training_step(self, batch, batch_idx):
        y = F.one_hot(batch[1], CLASSES).float()
        y = y + 0 * batch[0][:, :CLASSES]
        return F.mse_loss(self(torch.nan_to_num(batch[0])), y)


def fp16_overflow():
    net = network(norm=False, depth=4, width=64)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 1000)
    return net.half()


class Half(Healthy):
    def forward(self, x):
        return self.net(x.half())


def exploding(depth=20, std=1000.0, norm=False):
    net = network(norm=norm, depth=depth, width=128)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, std)
    return net


class LateLog(WithLoss):
    """Healthy until a step, then the logarithm of 0."""

    def __init__(self, bad=3, **kwargs):
        super().__init__(**kwargs)
        self.bad = bad

    def term(self, logits, batch):
        zero = 0.0 if self.global_step >= self.bad else 1.0
        return torch.log(torch.softmax(logits, 1) * zero + (1 - zero) * 0).mean() * -0.01  # here


OPERATIONS = {
    # name: model, rule, layer, owner of the marked line
    "log between modules": (lambda: Healthy(with_module(LogOfNegative())), "invalid-operation", "net.2", None),
    "log of 0 in the loss": (LogOfZero, "invalid-operation", None, LogOfZero),
    "root at 0, backward only": (RootAtZero, "invalid-gradient", None, RootAtZero),
    "where hides NaN": (Masked, "invalid-operation", None, Masked),
    "quotient": (Quotient, "invalid-operation", None, Quotient),
    "exponential": (Exponential, "overflow-by-range", None, Exponential),
    "mean of nothing": (EmptySelection, "invalid-operation", None, EmptySelection),
    "all labels ignored": (AllIgnored, "invalid-operation", None, AllIgnored),
    "softmax of all -inf": (AllOfARowMasked, "invalid-operation", None, AllOfARowMasked),
    "own autograd function": (CallsOwnFunction, "invalid-gradient", None, OwnFunction),
    "in place": (
        lambda: Healthy(with_module(nn.Sequential(Negated(), InPlace()))),
        "invalid-operation",
        "net.2.1",
        InPlace,
    ),
    "convolution": (Convolutions, "invalid-operation", "net", Convolutions.Net),
    "attention": (Attention, "invalid-operation", "net.attention", Attention.Net),
    "recurrent": (Recurrent, "invalid-operation", "net", Recurrent.Net),
    "two optimizers": (Gan, "invalid-operation", None, Gan),
    "fp16 overflow": (lambda: Half(fp16_overflow()), "overflow-by-range", "net.2", None),
    "overflow by initialisation": (lambda: Healthy(exploding()), "overflow-by-initialisation", "net.18", None),
    "late log of 0": (LateLog, "invalid-operation", None, LateLog),
}

TWINS = {
    "root beside 0": RootBesideZero,
    "masked before": MaskedBefore,
    "some masked": SomeMasked,
    "attention with padding": lambda: Attention(pad=3),
    "two optimizers": lambda: Gan(sick=False),
    "BatchNorm behind N(0, 1000²)": lambda: Healthy(exploding(5, norm=True)),
    "late log, never": lambda: LateLog(bad=1000),
    "depth 20 without norm": lambda: Healthy(network(norm=False, depth=20, width=128)),
}
