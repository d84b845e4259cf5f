"""Encoders of sounds: a folder of transformers, built by transformers from its config.json.

The vector of a sound is the mean over its steps, as transformers' classifiers of sounds take it; of the spectrogram
transformer (AST) and of CLAP it is what they give themselves.  Whisper fills sounds up with silence to 30 s; only the
steps of the sound count here.
"""

import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collapse import InputError
from collapse.checkpoints.huggingface import (
    checked_on_meta,
    config_of,
    filled,
    outermost,
    refuse_choices,
    state_of,
    taking,
)
from collapse.checkpoints.plan import Clues, Plan
from collapse.checkpoints.settings import number, shown, text, whole_number
from collapse.data.sounds import Waves
from collapse.files.containers import first_line

WAVES = ("data2vec-audio", "hubert", "unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm")
KINDS = (*WAVES, "audio-spectrogram-transformer", "clap", "whisper")
EXTRACTORS = {
    "audio-spectrogram-transformer": "ASTFeatureExtractor",
    "clap": "ClapFeatureExtractor",
    "whisper": "WhisperFeatureExtractor",
}
HEADS = r"quantizer|project_q|project_hid|lm_head|proj_out|classifier|projector|decoder|text_model|text_projection|" \
        r"logit_scale_\w|layer_weights|masked_spec_embed|final_proj|label_embeddings_concat"  # fmt: skip
SIZES = (
    "chunk_length",
    "feature_size",
    "fft_window_size",
    "hop_length",
    "max_length",
    "max_length_s",
    "n_fft",
    "num_mel_bins",
)
NONE = ("resize", "crop", "interpolation", "mean", "std", "dim", "heads", "activation", "projector", "pool")  # flags
FRAMES = 1 << 16  # of a spectrogram


class Listener(nn.Module):
    """A network of transformers with the vector that it gives of a sound: (n, ...) -> (n, d)."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net, kind
        self.main_blocks = [name for name in outermost(self) if "feature_extractor" not in name]  # one axis of channels
        self.steps = torch.ones(0)

    def forward(self, x: Tensor) -> Tensor:
        """(n, samples), or spectrograms -> (n, d). Raises InputError for sounds that the network does not take."""
        net: Any = self.net
        if self.kind == "whisper":
            self.steps, x = x[:, 0, -1], x[..., :-1]
        more = {"is_longer": torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)} if self.kind == "clap" else {}
        with taking(f"sounds of shape {tuple(x.shape)}"):
            given = net(x, **more)
        if self.kind == "clap":
            return given.audio_embeds
        if self.kind == "audio-spectrogram-transformer":
            return given.pooler_output
        return self.summary(given.last_hidden_state)

    def summary(self, hidden: Tensor) -> Tensor:
        """(n, t, d) of the last batch -> (n, d)."""
        if self.kind == "audio-spectrogram-transformer":
            return (hidden[:, 0] + hidden[:, 1]) / 2
        if self.kind != "whisper":
            return hidden.mean(1)
        places = torch.arange(hidden.shape[1], device=hidden.device)
        mask = (2 * places < self.steps[:, None]).to(hidden)[..., None]  # a place covers two steps of the spectrogram
        return (hidden * mask).sum(1) / mask.sum(1)


def kind(clues: Clues) -> str | None:
    """The kind of sound encoder that a config.json gives; None for others."""
    name = clues.model_type
    return name if name in KINDS and clues.given.arch is None else None


def plan(name: str, tensors: Mapping[str, Tensor], clues: Clues) -> tuple[str, Plan]:
    """(root, plan) of the encoder that a folder describes; every tensor that transformers takes for it is loaded.

    Raises InputError: a config far larger than the weights.
    """
    refuse_choices(clues, "sounds", NONE)
    values = clues.configs["config.json"]
    inner = "clap_audio_model" if name == "clap" else name
    config, model = config_of(inner, len(tensors), _audio(name, values), _class(name))
    create = partial(_made, model, config, name)
    checked_on_meta(create, name, tensors)
    net, used = filled(model, config, {}, tensors, clues.notes)
    if name == "whisper":
        net, used = net.encoder, tuple(key for key in used if key.startswith(("encoder.", "model.encoder.")))
    root, weights = state_of(net, used)
    waves = _waves(name, clues.configs.get("preprocessor_config.json", {}), config, clues)
    width = _width(Listener(net, name), waves)
    return root, Plan(f"transformers {name}", create, weights, width, waves, "tokens", heads=HEADS)


@torch.inference_mode()
def _width(net: Listener, waves: Waves) -> int:
    """How many numbers a sound gives. Raises InputError: the features are none that the network takes."""
    sound = torch.sin(torch.arange(float(max(waves.shortest, waves.rate // 4)))).numpy()
    try:
        features = waves(sound)
    except Exception as error:  # sizes that do not fit together, all the file's fault
        raise InputError(f"preprocessor_config.json: no such features can be ({first_line(error)})") from error
    return net(features[None]).shape[1]


def _audio(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the part that hears."""
    if name != "clap":
        return {**values, "apply_spec_augment": False}
    inner = values.get("audio_config")
    shared = {key: values[key] for key in ("projection_dim", "projection_hidden_act") if key in values}
    return {**(inner if isinstance(inner, Mapping) else {}), **shared}


def _class(name: str) -> Any:
    if name != "clap":
        return None
    try:
        from transformers.models.clap.modeling_clap import ClapAudioModelWithProjection
    except ImportError:
        return None  # config_of says so
    return ClapAudioModelWithProjection


def _made(model: Any, config: Any, name: str) -> Listener:
    net = model(config)
    return Listener(net.encoder if name == "whisper" else net, name)


def _waves(name: str, settings: Mapping[str, Any], config: Any, clues: Clues) -> Waves:
    """How sounds reach the network: its feature extractor, of transformers, with the numbers of its own config."""
    make = _extractor(name)
    if not settings:
        clues.notes.append(f"no preprocessor_config.json beside it: the features that {name} usually takes")
    numbers = {key: settings[key] for key in inspect.signature(make.__init__).parameters if key in settings}
    for key, value in numbers.items():
        if isinstance(value, str):
            text(f"preprocessor_config.json: {key}", value)
        elif value is not None and not isinstance(value, bool):
            number(f"preprocessor_config.json: {key}", value, -1e6, 1e6)
    whole_number("preprocessor_config.json: sampling_rate", numbers.get("sampling_rate"), 1, 768_000)
    for key in SIZES:
        whole_number(f"preprocessor_config.json: {key}", numbers.get(key), 1, FRAMES)
    if numbers.get("truncation") not in (None, "fusion", "rand_trunc"):
        raise InputError(f"preprocessor_config.json: truncation is {shown(numbers['truncation'])}, which is not known")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bands without a frequency, as AST's usual ones have
            made = make(**numbers)
    except Exception as error:  # impossible values, all the file's fault
        raise InputError(f"preprocessor_config.json: no such features can be ({first_line(error)})") from error
    return _limits(name, made, config)


def _extractor(name: str) -> Any:
    """The class of transformers that makes a kind's features."""
    if name in WAVES:
        from transformers import Wav2Vec2FeatureExtractor

        return Wav2Vec2FeatureExtractor
    import transformers

    return getattr(transformers, EXTRACTORS[name])


def _limits(name: str, made: Any, config: Any) -> Waves:
    """What of a sound is read. Longer ones are cut: transformers would cut CLAP's at random."""
    rate = int(made.sampling_rate)
    if name == "whisper":
        return Waves(made, rate, int(made.n_samples), hop=int(made.hop_length))
    if name == "clap":
        return Waves(made, rate, int(made.nb_max_samples))
    if name == "audio-spectrogram-transformer":
        return Waves(made, rate, int(made.max_length * rate // 100 + rate * 15 // 1000), shortest=rate // 40)
    shortest = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        shortest = (shortest - 1) * stride + kernel
    return Waves(made, rate, shortest=shortest)
