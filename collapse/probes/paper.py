"""The paper's linear probe: a classifier trained by SGD on the frozen representation of random crops.

SGD with momentum 0.9, learning rate 0.1 at batch 256, cosine to zero, weight decay 1e-6, 100 epochs, crops and flips;
the backbone in eval mode.  The quick probe, on features that are computed once, is `accuracy.probe`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from collapse import InputError
from collapse.data.labelled import Labelled, to_memory
from collapse.encoders.accuracy import Accuracy
from collapse.encoders.passes import embed
from collapse.models.encoder import Encoder
from collapse.recipes.views import Augmentation, uniforms
from collapse.training.loader import BatchOrder, Unreadable, batches
from collapse.training.optim import learning_rate


def probe_paper(
    net: Encoder, train: Labelled, val: Labelled, device: str, workers: int,
    epochs: int = 100, batch_size: int = 256, seed: int = 0, lr: float = 0.1,
) -> Accuracy:  # fmt: skip
    """Train the classifier on `train` and count on `val`; lr is at batch 256 and scales with the batch.

    Raises InputError: fewer images than a batch, or many that cannot be read.
    """
    if len(train) < batch_size:
        raise InputError(f"{len(train)} images, but a batch of {batch_size}; lower the batch size")
    train = to_memory(train, workers)
    size = net.preprocess.crop or net.preprocess.resize or np.asarray(train.images.open(0)).shape[0]
    augmentation = Augmentation(size, jitter=0.0, grayscale=0.0)
    plan = BatchOrder(len(train), batch_size, epochs, seed)
    width = net.report.get("feature_dim") or _width(net, val, device)
    classifier = nn.Linear(width, len(train.classes)).to(device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9, weight_decay=1e-6)
    labels, unreadable = torch.from_numpy(train.labels), Unreadable(len(train))
    for step, batch in enumerate(batches(train, plan, (augmentation,), 0, workers, device)):
        unreadable.note(batch.unreadable)
        u = uniforms(seed, batch.epoch, batch.images, 0, augmentation.DRAWS)
        uncropped = batch.pixels.ndim == 4
        x = augmentation.crop(batch.pixels, u) if uncropped else batch.pixels[:, 0].to(device).float() / 255
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, epochs * plan.per_epoch, 0, lr * batch_size / 256)
        with torch.no_grad():
            r = net.eval()(net.preprocess.standardise(x)).float()
        loss = F.cross_entropy(classifier(r), labels[torch.from_numpy(batch.images)].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    counts, start = Accuracy(0, 0, 0), 0
    for r in embed(net, val.batches(net.preprocess, batch_size, workers), net.preprocess, device):
        truth = torch.from_numpy(val.labels[start : start + len(r)]).to(device)
        counts += Accuracy.of(classifier(r.clone()), truth)
        start += len(r)
    return counts


def _width(net: Encoder, data: Labelled, device: str) -> int:
    """How many entries a representation has, of a network of which nothing says it."""
    return int(next(embed(net, data.batches(net.preprocess, 2, 0), net.preprocess, device)).shape[1])
