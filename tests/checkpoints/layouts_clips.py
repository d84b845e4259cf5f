"""Folders of encoders of clips as transformers writes them, tiny, with random weights."""

from functools import partial

import torch
import transformers
from layouts import SMALL, Layout, folder_of, layout

ROWS: list[Layout] = []
row = partial(layout, rows=ROWS)  # the functions below write a folder, and give the reference
SIZE, FRAMES = 32, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
          "image_mean": MEAN, "image_std": STD}  # fmt: skip


def normalised(clips):
    """(n, frames, 3, h, w) in 0..1 as the processors make it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (clips - mean) / std


@row("transformers, VideoMAE", "the mean over the patches of a clip; fine-tuned with mean pooling, then `fc_norm`")
def videomae(folder, fine_tuned=True):
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        **SMALL, image_size=SIZE, patch_size=16, num_frames=FRAMES, use_mean_pooling=fine_tuned, decoder_hidden_size=16,
        decoder_num_attention_heads=2, decoder_num_hidden_layers=1, decoder_intermediate_size=16,
    )  # fmt: skip
    kind = transformers.VideoMAEForVideoClassification if fine_tuned else transformers.VideoMAEForPreTraining
    processor = transformers.VideoMAEImageProcessor(**PIXELS)
    model = folder_of(folder, kind(config), processor)
    norm = model.fc_norm if fine_tuned else torch.nn.Identity()
    return lambda clips: norm(model.videomae(normalised(clips)).last_hidden_state.mean(1))


@row("transformers, V-JEPA 2", "the encoder, its mean over the patches of a clip; not the predictor")
def vjepa2(folder):
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=1, crop_size=SIZE, patch_size=16,
        frames_per_clip=FRAMES, pred_hidden_size=48, pred_num_attention_heads=4, pred_num_hidden_layers=1,
    )  # fmt: skip
    processor = transformers.VJEPA2VideoProcessor(**PIXELS)
    model = folder_of(folder, transformers.VJEPA2Model(config), processor)
    return lambda clips: model(normalised(clips), skip_predictor=True).last_hidden_state.mean(1)
