# SPDX-License-Identifier: Apache-2.0
"""What the processes of ``processes.py`` share: imported once, by the server that they are forked from."""

import lightning.pytorch
import pytorch_lightning
import torch
from torch.utils.tensorboard import SummaryWriter

import lightning_bn

torch.set_num_threads(1)
READY = [lightning.pytorch.Trainer, pytorch_lightning.Trainer, SummaryWriter]
READY += [getattr(lightning_bn, name) for name in lightning_bn.__all__]
