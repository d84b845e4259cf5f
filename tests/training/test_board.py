"""What TensorBoard itself reads of a run: the numbers of the curve in groups, and a picture a measurement."""

import io
import json
import sys

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from collapse import InputError
from collapse.data.labelled import of_arrays, open_data
from collapse.recipes.config import make_config
from collapse.training.train import Options, train

TINY = make_config("digits", blocks=(1, 1), planes=(8, 16), batch_size=40, dim=8, epochs=2)
WATCHED = Options(save_every=2, log_every=1, spectrum_every=2, knn_every=1, tensorboard=True)


@pytest.fixture(scope="module")
def sets():
    train_set, val = (open_data("sklearn:digits", split) for split in ("train", "val"))
    return tuple(of_arrays(part.images.pixels[:160], part.labels[:160]) for part in (train_set, val))


def test_a_run_that_went_on_is_read_back_in_groups_and_with_pictures(sets, tmp_path):
    open_figures = plt.get_fignums()
    running = train(tmp_path, TINY, *sets, WATCHED)
    for _ in range(5):  # saved at 4, and killed after 5
        next(running)
    running.close()
    list(train(tmp_path, TINY, *sets, WATCHED))
    board = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    curve = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == list(range(1, 9))
    names = {tag: tag.partition("/")[2] for tag in board.Tags()["scalars"]}
    names = {tag: f"embedding_{name}" if tag.startswith("embedding") else name for tag, name in names.items()}
    assert set(names.values()) == {name for line in curve for name in line} - {"step"}
    assert {"loss/loss", "loss/epoch_loss", "accuracy/knn_top1", "accuracy/classifier_top1", "schedule/lr",
            "speed/waited", "spectrum/effective_rank", "embedding_spectrum/effective_rank"} <= set(names)  # fmt: skip
    assert len({tag.partition("/")[0] for tag in names}) == 6
    for tag, name in names.items():
        expected = [(line["step"], line[name]) for line in curve if name in line]
        found = [(event.step, event.value) for event in board.Scalars(tag)]
        np.testing.assert_allclose(found, np.array(expected, dtype=float), rtol=1e-6, err_msg=tag)  # None is NaN
    assert board.Tags()["images"] == ["spectrum/curves"]
    pictures = board.Images("spectrum/curves")
    assert [picture.step for picture in pictures] == [2, 4, 6, 8]
    with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20  # something is drawn
    assert plt.get_fignums() == open_figures


def test_without_tensorboard_one_line_says_what_to_install(sets, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="tensorboard=True: not installed; pip install tensorboard"):
        list(train(tmp_path, TINY, *sets, WATCHED))
