"""Folders of encoders of clips as transformers writes them, tiny, with random weights."""

import torch
import transformers
from layouts import Layout

ROWS: list[Layout] = []
SIZE, FRAMES = 32, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
          "image_mean": MEAN, "image_std": STD}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def row(project, taken):
    """Register the function below as the writer of a row of docs/checkpoints.md; it returns the reference."""

    def register(write):
        ROWS.append(Layout(project, taken, "the only one", "-", write))
        return write

    return register


def saved(folder, model, processor):
    """A network in a folder, with its processor; norms and biases are not the initial ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.rand_like(parameter) if parameter.ndim == 1 else 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


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
    model = saved(folder, kind(config), processor)
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
    model = saved(folder, transformers.VJEPA2Model(config), processor)
    return lambda clips: model(normalised(clips), skip_predictor=True).last_hidden_state.mean(1)
