# SPDX-License-Identifier: Apache-2.0
"""Small networks of many kinds, healthy and sick, for the studies that thresholds of rules stand on.

``HEALTHY`` and ``SICK`` map a name to a ``Specimen``. ``specimen.build(seed)`` gives a ``Case``: ``model``, the data
``train`` and ``val`` as pairs (x, y), ``loss``, ``score`` with the value that is ``enough``, and ``optimizer``, which
is given the parameters. ``train(case, steps, watch=...)`` trains it, ``validate(case)`` scores it.
``specimen.fault`` is the slug of the rule that has to find it (empty: healthy).

Example:
    from zoo import HEALTHY; from zoo_cases import train, validate
    case = HEALTHY["ResNet, BatchNorm"].build(0); train(case, 300); print(validate(case) > case.enough)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.nn.utils.parametrizations import spectral_norm
from zoo_cases import (
    Specimen,
    adam,
    classify,
    dead_bias,
    decided,
    digits,
    explained,
    fill,
    glorot,
    likeness,
    paired,
    pretrained,
    rivalry,
    sgd,
    teacher,
)
from zoo_models import (
    Scaled,
    adversaries,
    autoencoder,
    dense,
    dictionary,
    experts,
    fixup,
    highway,
    low_rank,
    mixer,
    mlp,
    mobile,
    modulated,
    new_head,
    resnet,
    rezero,
    small_head,
    squeezed,
    transformer,
    vgg,
    vit,
    wide_resnet,
    zero_closers,
)
from zoo_networks import CLASSES, PIXELS, GatedCell, Recurrent, UNet, perceptron

CLASSIFIERS: dict[str, Specimen] = {
    **{f"MLP {depth}": classify(partial(mlp, depth)) for depth in (2, 5, 10)},
    "MLP 5, He, SGD 0.1": classify(partial(mlp, 5), sgd(0.1, 0.0), prepare=fill("he")),
    "MLP 5, Xavier": classify(partial(mlp, 5), prepare=fill("xavier")),
    "MLP 20, He": classify(partial(mlp, 20), prepare=fill("he")),
    "MLP 2, N(0, 0.01²)": classify(partial(mlp, 2), prepare=fill("naive")),
    "MLP 2, SGD 0.01": classify(partial(mlp, 2), sgd(0.01)),
    "MLP 2, Adam 0.01": classify(partial(mlp, 2), adam(1e-2)),
    "MLP 3, 8 wide": classify(partial(mlp, 3, width=8), adam(1e-2), prepare=fill("he"), enough=0.4),
    "MLP 2, 512 wide": classify(partial(mlp, 2, width=512)),
    "MLP 5, 512 wide, N(0, 0.02²)": classify(partial(mlp, 5, width=512), prepare=fill(0.02)),
    **{f"MLP {depth}, BatchNorm": classify(partial(mlp, depth, "batch")) for depth in (2, 5, 10)},
    "MLP 5, BatchNorm, N(0, 0.01²)": classify(partial(mlp, 5, "batch"), prepare=fill("naive")),
    "MLP 3, BatchNorm, N(0, (10⁻⁴)²), SGD": classify(partial(mlp, 3, "batch"), sgd(0.01), prepare=fill(1e-4)),
    "MLP 5, BatchNorm, N(0, (10⁻⁴)²), Adam": classify(partial(mlp, 5, "batch"), prepare=fill(1e-4)),
    "MLP 5, BatchNorm, N(0, 1)": classify(partial(mlp, 5, "batch"), prepare=fill(1.0), enough=0.4),
    "MLP 5, BatchNorm, SGD 0.1": classify(partial(mlp, 5, "batch"), sgd(0.1), prepare=fill("he")),
    "MLP 3, BatchNorm, dropout 0.3": classify(partial(mlp, 3, "batch", dropout=0.3)),
    "MLP, BatchNorm, dropout 0.5 behind": classify(dense),
    "MLP 5, LayerNorm": classify(partial(mlp, 5, "layer")),
    "MLP 5, GroupNorm": classify(partial(mlp, 5, "group")),
    "MLP 5, GELU": classify(partial(mlp, 5, act=nn.GELU)),
    "MLP 5, SiLU": classify(partial(mlp, 5, act=nn.SiLU), prepare=fill("he")),
    "MLP 5, ReLU6, BatchNorm": classify(partial(mlp, 5, "batch", nn.ReLU6)),
    "MLP 5, tanh": classify(partial(mlp, 5, act=nn.Tanh), prepare=fill("xavier")),
    "MLP 3, tanh, Adam 0.01": classify(partial(mlp, 3, act=nn.Tanh), adam(1e-2)),
    "MLP 3, hardtanh, SGD 0.1": classify(partial(mlp, 3, act=nn.Hardtanh), sgd(0.1)),
    "MLP 3, softsign": classify(partial(mlp, 3, act=nn.Softsign)),
    "MLP 2, sigmoid": classify(partial(mlp, 2, act=nn.Sigmoid)),
    "MLP 2, sigmoid, Adam 0.03": classify(partial(mlp, 2, act=nn.Sigmoid), adam(3e-2)),
    "MLP 5, sigmoid, BatchNorm": classify(partial(mlp, 5, "batch", nn.Sigmoid)),
    "MLP, inputs x 10⁴, BatchNorm": classify(lambda: nn.Sequential(Scaled(1e4), mlp(5, "batch"))),
    "MLP, inputs x 0.01, BatchNorm": classify(lambda: nn.Sequential(Scaled(0.01), mlp(5, "batch"))),
    "MLP, inputs x 100": classify(lambda: nn.Sequential(Scaled(100.0), mlp(2)), enough=0.4),
    "MLP, head x 0.01": classify(partial(small_head, 0.01)),
    "VGG": classify(vgg),
    "VGG, He, SGD 0.03": classify(vgg, sgd(0.03), prepare=fill("he")),
    "VGG, GELU": classify(partial(vgg, act=nn.GELU)),
    "VGG, BatchNorm": classify(partial(vgg, "batch")),
    "ResNet, BatchNorm": classify(resnet),
    "ResNet, BatchNorm, SGD 0.1, decay": classify(resnet, sgd(0.1, decay=5e-4), prepare=fill("he")),
    "ResNet, γ = 0": classify(resnet, prepare=lambda model, _: zero_closers(model)),
    "ResNet, no norm": classify(partial(resnet, "none")),
    "ResNet 8 blocks, no norm, He": classify(partial(resnet, "none", 4), prepare=fill("he")),
    "ResNet, GroupNorm": classify(partial(resnet, "group")),
    "WRN, dropout 0.3": classify(wide_resnet),
    "ReZero": classify(partial(rezero, 0.0)),
    "Fixup": classify(fixup),
    "residual MLP, no norm": classify(partial(rezero, 1.0, 16)),
    "transformer, pre-norm, ReLU": classify(partial(transformer, nn.ReLU, first=True), adam(3e-3), enough=0.4),
    "transformer, post-norm, GELU": classify(partial(transformer, nn.GELU, first=False), adam(3e-3), enough=0.4),
    "transformer, zero gates": classify(modulated, adam(3e-3), enough=0.4),
    "ViT": classify(vit, adam(3e-3), enough=0.4),
    "MLP-Mixer": classify(mixer),
    "LSTM": classify(Recurrent, adam(1e-2)),
    "gated cell": classify(GatedCell, adam(1e-2)),
    "gated cell, bias 3": classify(partial(GatedCell, bias=3.0), adam(1e-2)),
    "highway, bias -2": classify(partial(highway, -2.0)),
    "highway, bias -5": classify(partial(highway, -5.0)),
    "SE-ResNet": classify(squeezed),
    "MobileNet-like": classify(mobile, adam(3e-3)),
    "MobileNet-like, eps 1e-3, decay": classify(partial(mobile, 1e-3), sgd(0.1, decay=5e-4)),
    "experts": classify(experts),
    "spectral norm": classify(
        partial(mlp, 3),
        prepare=lambda model, _: [spectral_norm(x) for x in model.modules() if isinstance(x, nn.Linear)],
    ),
    "LoRA": classify(pretrained(partial(mlp, 3), low_rank)),
    "LoRA, transformer": classify(pretrained(partial(transformer, nn.GELU, first=True), low_rank), enough=0.4),
    "frozen trunk": classify(pretrained(partial(resnet, "batch"), new_head)),
    "fine-tuned": classify(pretrained(partial(vgg, "batch"), lambda _: None), sgd(1e-3)),
}


def _noisy(x: Tensor, _: Tensor) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def _grey(x: Tensor, _: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


masks = paired(digits, _noisy, lambda x, _: (x > 0).float())
halves = paired(digits, lambda x, _: x, lambda _, y: (y < CLASSES / 2).float()[:, None])
grey = paired(digits, _grey, lambda x, y: _grey(x, y).flatten(1))
signed = paired(digits, lambda x, y: 2 * _grey(x, y) - 1, lambda x, y: 2 * _grey(x, y) - 1)
fit = partial(classify, loss=F.mse_loss, score=explained, enough=0.3)
OTHERS: dict[str, Specimen] = {
    "binary, sigmoid": classify(
        lambda: nn.Sequential(nn.Flatten(), perceptron([PIXELS, 64, 64, 1], nn.ReLU, "batch"), nn.Sigmoid()),
        adam(1e-2),
        data=halves,
        loss=F.binary_cross_entropy,
        score=decided,
        enough=0.8,
    ),
    "U-Net, attention": classify(
        UNet,
        adam(3e-3),
        data=masks,
        loss=F.binary_cross_entropy_with_logits,
        score=lambda y, aim: decided(y.sigmoid(), aim),
        enough=0.8,
    ),
    "autoencoder, tanh": fit(partial(autoencoder, nn.Tanh), adam(3e-3), data=grey),
    "autoencoder, ReLU, BatchNorm": fit(partial(autoencoder, nn.ReLU, "batch"), adam(3e-3), data=grey),
    "sparse autoencoder": fit(dictionary, data=grey),
    "GAN": classify(adversaries, adam(), data=signed, loss=rivalry, score=likeness, enough=0.5),
    "teacher, regression": fit(lambda: perceptron([20, 64, 64, 1], nn.ReLU), adam(3e-3), data=teacher),
    "teacher, regression, tanh": fit(lambda: perceptron([20, 64, 64, 1], nn.Tanh), adam(3e-3), data=teacher),
    "teacher, classes, BatchNorm": classify(
        lambda: perceptron([20, 64, 64, 5], nn.ReLU, "batch"), data=partial(teacher, 5), enough=0.4
    ),
}
HEALTHY = CLASSIFIERS | OTHERS
"""Networks that train, and that no rule may speak of."""

VANISHING = {
    **{
        f"MLP {depth}, {width} wide, N(0, 0.01²), {title}": classify(
            partial(mlp, depth, width=width), rate, prepare=fill("naive")
        )
        for depth, width, title, rate in (
            (5, 64, "SGD", sgd(0.01)),
            (5, 128, "SGD", sgd(0.01)),
            (5, 128, "Adam", adam()),
            (5, 256, "SGD", sgd(0.01)),
            (8, 128, "SGD", sgd(0.1)),
            (10, 128, "SGD", sgd(0.01)),
            (20, 128, "SGD", sgd(0.01, 0.0)),
            (12, 256, "Adam", adam()),
        )
    },
    "MLP 20, GELU, N(0, 0.01²)": classify(partial(mlp, 20, act=nn.GELU), sgd(0.01), prepare=fill("naive")),
    "MLP 10, tanh, N(0, 0.01²)": classify(partial(mlp, 10, act=nn.Tanh), sgd(0.01), prepare=fill("naive")),
    "MLP 20, U(-0.05, 0.05)": classify(partial(mlp, 20), sgd(0.01), prepare=fill("uniform")),
    "MLP 10, N(0, 0.01²), biases kept": classify(partial(mlp, 10), sgd(0.01), prepare=fill(0.01, biases=False)),
    "MLP 20, biases kept": classify(partial(mlp, 20), sgd(0.01)),
    "MLP 30, Xavier of tanh": classify(partial(mlp, 30), sgd(0.01), prepare=glorot),
    "MLP 20, sigmoid": classify(partial(mlp, 20, act=nn.Sigmoid), sgd(0.01)),
    "VGG, N(0, 0.01²)": classify(vgg, sgd(0.01), prepare=fill("naive")),
    "teacher, MLP 8, N(0, 0.01²)": fit(
        lambda: perceptron([20, *[64] * 8, 1], nn.ReLU), sgd(0.01), data=teacher, prepare=fill("naive")
    ),
}
EXPLODING = {
    **{
        f"MLP {depth}, {width} wide, N(0, {std:g}²)": classify(
            partial(mlp, depth, width=width), rate, prepare=fill(std)
        )
        for depth, width, std, rate in (
            (5, 64, 1.0, adam()),
            (5, 128, 1.0, sgd(0.01)),
            (5, 256, 1.0, adam()),
            (10, 128, 0.5, adam()),
            (20, 128, 1.0, adam()),
            (20, 128, 0.25, sgd(0.01)),
        )
    },
    "VGG, N(0, 1)": classify(vgg, prepare=fill(1.0)),
    "MLP 20, SiLU, N(0, 1)": classify(partial(mlp, 20, act=nn.SiLU), prepare=fill(1.0)),
    "teacher, MLP 8, N(0, 1)": fit(
        lambda: perceptron([20, *[64] * 8, 1], nn.ReLU), sgd(1e-4), data=teacher, prepare=fill(1.0)
    ),
}
DEAD = {
    **{
        f"MLP {depth}, {width} wide, BatchNorm, bias {bias:g}": classify(
            partial(mlp, depth, "batch", width=width), prepare=dead_bias(1, bias)
        )
        for depth, width, bias in ((3, 128, -10.0), (5, 64, -6.0), (3, 512, -10.0))
    },
    "VGG, BatchNorm, bias -10": classify(partial(vgg, "batch"), prepare=dead_bias(3)),
    **{
        f"MLP {depth}, {norm}, SGD {rate:g}": classify(partial(mlp, depth, norm), sgd(rate, 0.0), prepare=fill("he"))
        for depth, norm, rate in ((3, "batch", 10.0), (5, "batch", 10.0), (5, "layer", 10.0))
    },
    "MLP 3, Adam 0.3": classify(partial(mlp, 3), adam(0.3)),
    "VGG, Adam 0.1": classify(vgg, adam(0.1)),
    "MLP 2, inputs - 50": classify(lambda: nn.Sequential(Scaled(1.0, -50.0), mlp(2)), sgd(0.1)),
}
SATURATED = {
    **{
        f"MLP 5, {act.__name__}, {width} wide, N(0, {std:g}²)": classify(
            partial(mlp, 5, act=act, width=width), prepare=fill(std)
        )
        for act, width, std in (
            (nn.Tanh, 128, 1.0),
            (nn.Tanh, 64, 1.0),
            (nn.Tanh, 256, 0.5),
            (nn.Tanh, 128, 5.0),
            (nn.Sigmoid, 128, 1.0),
            (nn.Sigmoid, 256, 1.0),
            (nn.Hardtanh, 128, 1.0),
            (nn.Hardsigmoid, 256, 1.0),
            (nn.Softsign, 128, 100.0),
        )
    },
    "MLP 3, tanh, inputs x 100": classify(lambda: nn.Sequential(Scaled(100.0), mlp(3, act=nn.Tanh))),
    "MLP 3, sigmoid, inputs x 1000": classify(lambda: nn.Sequential(Scaled(1000.0), mlp(3, act=nn.Sigmoid))),
    "MLP 5, tanh, SGD 10": classify(partial(mlp, 5, act=nn.Tanh), sgd(10.0, 0.0), prepare=fill("xavier")),
    "MLP 3, sigmoid, Adam 3": classify(partial(mlp, 3, act=nn.Sigmoid), adam(3.0)),
}
FLAT = {
    f"MLP {depth}, BatchNorm, N(0, {std:g}²)": classify(partial(mlp, depth, "batch"), rate, prepare=fill(std))
    for depth, std, rate in ((5, 1e-5, sgd(0.1)), (10, 1e-6, adam()))
} | {
    "MLP, inputs x 10⁻⁵, BatchNorm": classify(lambda: nn.Sequential(Scaled(1e-5), mlp(3, "batch")), sgd(0.01)),
    "VGG, BatchNorm, N(0, 1e-5²)": classify(partial(vgg, "batch"), sgd(0.01), prepare=fill(1e-5)),
}
SICK: dict[str, Specimen] = {
    f"{name}": specimen.sick(fault)
    for fault, group in (
        ("vanishing-signal", VANISHING),
        ("exploding-signal", EXPLODING),
        ("dead-units", DEAD),
        ("saturated-units", SATURATED),
        ("variance-below-epsilon", FLAT),
    )
    for name, specimen in group.items()
}
"""Networks with one planted fault each."""
