"""What a GPU would be given, without one: graphs, messages, kernels and waits are counted, and order is recorded."""

import math
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._functorch.config
from torch import distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from collapse import arguments
from collapse.commands import shared
from collapse.data import batches
from collapse.data.labelled import of_arrays
from collapse.encoders import processes
from collapse.encoders.networks import How
from collapse.models.backbones import make_backbone
from collapse.recipes.config import make_config
from collapse.recipes.views import Augmentation, uniforms
from collapse.training import loop, parallel
from collapse.training.loader import Batch, BatchOrder
from collapse.training.loader import batches as batches_of
from collapse.training.loop import Ask, ahead
from collapse.training.network import memory_estimate
from collapse.training.state import Options, Training
from collapse.training.train import train

SMALL = make_config("digits", blocks=(1, 1), planes=(8, 16), batch_size=16, image_size=16)


class Count(TorchDispatchMode):
    """Counts operations by name, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        self.seen[name] = self.seen.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def eight():
    """A world of eight, of which the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile has made, with a compiler that needs no C++."""
    torch._dynamo.reset()
    counters.clear()
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend="aot_eager_decomp_partition"))
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 1.0


def training_of(config, **options):
    return Training(config, 10, BatchOrder(160, 16, 2, 0), Options(**options))


def step_of(training):
    views = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    training.run_step(views, torch.arange(16) % 10)


def test_a_norm_over_all_ranks_sends_one_message_each_way(eight):
    net = parallel.synchronise(make_backbone("resnet18", 16, (1, 1), (8, 16), 3), "cpu", True)
    norms = sum(isinstance(module, parallel.SyncBatchNorm) for module in net.modules())
    x = torch.randn(4, 3, 16, 16)
    with Count() as count:
        net(x).sum().backward()
    sent = {name: n for name, n in count.seen.items() if name.startswith("_c10d_functional") and "wait" not in name}
    both = ("_c10d_functional.all_gather_into_tensor", "_c10d_functional.all_reduce")
    assert sent == dict.fromkeys(both, norms)


def test_a_compiled_network_of_several_processes_is_one_graph(eight, graphs, monkeypatch):
    monkeypatch.setattr(parallel, "distributed", lambda net: net)  # a wrapper that the fake group does not know
    training = training_of(SMALL, compile=True)
    for _ in range(2):
        step_of(training)
    training.network.eval()
    training.network.train()
    step_of(training)
    assert graphs() == (1, 0)
    assert any(isinstance(module, parallel.SyncBatchNorm) for module in training.network.backbone.modules())


def test_eager_networks_on_cuda_have_torchs_own_norms(eight):
    net = parallel.synchronise(make_backbone("resnet18", 16, (1,), (8,), 3), "cuda:0", False)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) == 3


@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize("grayscale", [0.2, 1.0])  # of 1, every image of a batch is grey
def test_masked_colours_are_the_gathered_ones_to_the_bit(size, grayscale):
    images = torch.rand(24, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation(size, grayscale=grayscale, blur=0.5, solarize=0.3)
    for epoch in range(3):
        u = uniforms(0, epoch, np.arange(24), 0, augmentation.DRAWS)
        assert torch.equal(augmentation.masked(images, u), augmentation.colour(images.clone(), u))


class Sent(Count):
    """Counts operations, and the copies to a device: from pinned memory, and from any other, which may wait."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.pinned, self.copies = [], {"pinned": 0, "other": 0}
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: self.pinned.append(x) or x)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(function, types, args, kwargs)
        moved = isinstance(made, torch.Tensor) and made.device.type == "cuda" and len(args) > 0
        if moved and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu" and args[0].ndim:
            self.copies["pinned" if any(args[0] is x for x in self.pinned) else "other"] += 1
        return made


def test_views_wait_for_nothing_and_their_choices_travel_at_once(monkeypatch):
    """Operations on the device, and copies to it, of a whole view; on a fake device, which cannot be read."""
    u = torch.rand(16, Augmentation.DRAWS)
    draws = u.numpy()
    monkeypatch.setattr(torch.Tensor, "numpy", lambda x: draws)  # a fake one's view of u has no numbers
    with FakeTensorMode(allow_non_fake_inputs=True), Sent(monkeypatch) as sent:
        x = torch.empty(16, 3, 24, 24, device="cuda")
        made = Augmentation(24, blur=0.5, solarize=0.3, degrees=10.0)(x, u)
    assert made.device.type == "cuda"
    assert sent.copies == {"pinned": 2, "other": 0}  # places and draws
    assert not {"aten._local_scalar_dense", "aten.nonzero", "aten.item"} & sent.seen.keys()


def test_a_batch_of_a_set_in_memory_is_chosen_without_a_wait(monkeypatch):
    data = of_arrays(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), np.arange(64) % 2)
    with FakeTensorMode(allow_non_fake_inputs=True), Sent(monkeypatch) as sent:
        source = batches_of(data, BatchOrder(64, 16, 2, 0), (), 0, 0, "cuda")
        chosen = [next(source).pixels for _ in range(3)]
    assert [pixels.device.type for pixels in chosen] == ["cuda"] * 3
    assert sent.copies == {"pinned": 3, "other": 1}  # the whole set travels once


def test_labels_travel_as_views_do(monkeypatch, tmp_path):
    sent = []
    monkeypatch.setattr(loop, "to_device", lambda x, device: sent.append((x.dtype, len(x), device)) or x)
    data = of_arrays(torch.zeros(48, 3, 16, 16, dtype=torch.uint8), np.arange(48) % 2)
    list(train(tmp_path / "run", replace(SMALL, epochs=1), data, options=Options(spectrum_every=0, knn_every=0)))
    assert sent == [(torch.int64, 16, "cpu")] * 3


def test_a_change_that_is_never_drawn_is_not_computed():
    """On a device every change is made in all rows: a blur of none costs two products a view."""
    images, u = torch.rand(4, 3, 24, 24), torch.rand(4, Augmentation.DRAWS)
    seen = {}
    for blur in (0.0, 0.1):
        with Count() as count:
            Augmentation(24, blur=blur).masked(images, u)
        seen[blur] = count.seen
    assert "aten.bmm" in seen[0.1]
    assert "aten.bmm" not in seen[0.0]


def test_compiled_views_are_one_graph_of_few_kernels_each_and_the_same_numbers():
    """Crop, mirror and colours of a set in memory; a second run in the same process compiles nothing."""
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    config = replace(SMALL, image_size=24, blur=(0.5, 0.2), solarize=(0.0, 0.3), jitter=0.8)
    compiled, plain = (training_of(config, compile=compile_) for compile_ in (True, False))
    pixels = torch.randint(0, 256, (8, 3, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for epoch in range(2):
        batch = Batch(epoch, np.arange(8), pixels, [])
        for made, wanted in zip(compiled.views(batch), plain.views(batch), strict=True):
            torch.testing.assert_close(made, wanted, rtol=0, atol=2e-5)  # pixels over a deviation of 0.3
    training_of(replace(config, temperature=0.3), compile=True).views(batch)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    generated = metrics.generated_kernel_count
    with Count() as count:
        plain.views(batch)
    assert generated < sum(count.seen.values()) / 8
    torch._dynamo.reset()


def test_the_processes_keep_no_buffers_alike_and_no_second_copy_of_gradients(eight):
    net = parallel.distributed(make_backbone("resnet18", 16, (1,), (8,), 3))
    assert not net.will_sync_module_buffers()
    assert net.gradient_as_bucket_view


@pytest.mark.parametrize("head", ["mlp", "none", "linear"])
def test_the_backbone_alone_is_compiled_whatever_the_head(graphs, head):
    training = training_of(replace(SMALL, head=head), compile=True)
    plain = training_of(replace(SMALL, head=head))
    for each in (training, plain):
        step_of(each)
        each.read()
    assert graphs() == (1, 0)
    assert list(training.network.state_dict()) == list(plain.network.state_dict())
    assert training.window == pytest.approx(plain.window, rel=1e-5)


def kept(training):
    """Bytes that one forward pass keeps for the backward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in training.network.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = torch.randn(2, 16, 3, 16, 16).unbind()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = training.net(*views)
    assert len(made) == 3
    return sum(seen.values())


def test_a_compiled_network_recomputes_activations_within_its_budget(graphs):
    """Also where the same process has compiled the same network with another budget before."""
    whole = kept(training_of(SMALL, compile=True))
    part = kept(training_of(SMALL, compile=True, checkpoint=True))
    assert part < 0.7 * whole
    assert kept(training_of(SMALL, compile=True)) == whole


def test_what_a_step_keeps_is_estimated():
    """Before it runs, from the layers' outputs alone."""
    assert memory_estimate(SMALL, 16) == pytest.approx(kept(training_of(SMALL)), rel=0.15)


def test_a_question_to_all_processes_is_asked_about_once_a_second(monkeypatch):
    now, asked, signals = [0.0], [], [0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "largest", lambda values: asked.append(now[0]) or [max(v, 0.0) for v in values])
    ask = Ask(0, lambda: signals[0], lambda: [now[0] > 99, False])
    for step in range(1, 2001):
        now[0] += 0.05
        if step == 1000:
            signals[0] = 15
        stopped, (late, _) = ask(step, step == 1500)
        if stopped or late:
            assert step - 1000 < 25 or step > 1500 or stopped == 15
    assert len(asked) == pytest.approx(100, abs=4)  # 2000 steps in 100 s
    assert now[0] > 99
    assert late or ask(2001, True)[1] == [True, False]
    monkeypatch.setattr(processes, "world", lambda: 1)
    alone = Ask(0, lambda: signals[0], lambda: [])
    alone(1, False)
    assert alone(2, False)[0] == 15  # one process asks itself, every step


@pytest.mark.parametrize(("epoch", "measured", "written"), [(2.5, 1.0, 0.9), (150.0, 12.0, 4.0), (600.0, 20.0, 30.0)])
def test_measurements_and_saves_take_a_twentieth_of_the_time_each(monkeypatch, epoch, measured, written):
    """At the defaults on CUDA; a state is written by a thread, which the steps do not wait for."""
    now, times = [0.0], {"measuring": 0, "saving": 0}
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    measuring, saving = loop.Due(None, None, "rare"), loop.Due(None, 600.0, "rare")
    for index in range(1000):
        now[0] += epoch
        if measuring(index, True):
            times["measuring"] += 1
            with measuring.timed():
                now[0] += measured
        if saving(index, True, lambda: written):
            times["saving"] += 1
            with saving.timed():
                now[0] += 0.01
        assert not measuring(index, False)
    assert times["measuring"] * measured <= 1.02 * loop.SHARE * now[0]
    assert times["saving"] * written <= 1.02 * loop.SHARE * now[0]
    assert times["measuring"] * (measured / loop.SHARE + measured + epoch) >= 0.98 * now[0]  # no rarer than it must be
    assert not saving(0, True, lambda: math.inf)  # while the last state is being written


def test_what_is_due_by_seconds_is_due_at_any_step_and_alone_at_no_epochs_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    due = loop.Due(None, 30.0, False)
    now[0] = 29.0
    assert not due.late()
    now[0] = 31.0
    assert due.late()
    assert not due(7, True)
    assert loop.Due(7, None, False)(14, False)
    assert loop.Due(None, None, True)(7, True)


def test_a_gpu_gets_embeddings_from_all_its_cores_by_pinned_batches_of_256(monkeypatch):
    for module in (shared, arguments):
        monkeypatch.setattr(module, "device_of", lambda name: "cuda" if name == "auto" else name)
    monkeypatch.setattr(shared, "cores", lambda: 48)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert shared.placed(Namespace(device="auto", workers=None, distributed=False)) == {"device": "cuda", "workers": 24}
    assert shared.placed(Namespace(device="auto", workers=3, distributed=False))["workers"] == 3
    assert shared.placed(Namespace(device="cpu", workers=None, distributed=False))["workers"] == 4
    assert [How.of(None, {"device": device})[0].batch_size for device in ("auto", "cpu")] == [256, 64]
    made = {}
    monkeypatch.setattr(batches, "DataLoader", lambda data, **options: made.update(options) or [])
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert list(batches.decoded([None] * 40, batches.Preprocessing(), 256, 24)) == []
        assert made["pin_memory"] is there


@contextmanager
def _nothing(*arguments):
    yield


def test_a_step_is_launched_before_the_next_batch_is_waited_for(monkeypatch):
    happened = []

    class Stream:
        def __init__(self, *arguments): ...

        def wait_stream(self, other):
            happened.append("wait")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", _nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)

    def source():
        for index in range(3):
            happened.append(f"fetch {index}")
            yield Batch(0, np.arange(2), torch.zeros(2), [])

    for index, _ in enumerate(ahead(source(), lambda batch: (torch.zeros(2), torch.zeros(2)), "cuda")):
        happened.append(f"launch {index}")
    assert [h for h in happened if h != "wait"] == [f"{what} {i}" for i in range(3) for what in ("fetch", "launch")]
