"""Encoders of texts: a folder of transformers or sentence-transformers, built by transformers from its config.json.

modules.json lists what follows the transformer: Pooling, Dense, Normalize.  A folder without it is a bare transformer,
which sentence-transformers itself would pool by the mean; of a decoder the last piece has seen all others.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from collapse.checkpoints.keys import Weights
from collapse.checkpoints.plan import Clues, Plan
from collapse.checkpoints.settings import choice, flag, shown, text, whole_number
from collapse.data.texts import Words
from collapse.files import containers, folders, vocabularies

ENCODERS = ("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert",
            "jina_embeddings_v3", "modernbert", "mpnet", "mt5", "nomic_bert", "roberta", "t5",
            "xlm-roberta")  # fmt: skip
DECODERS = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
FROM_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")  # whose positions are counted from the padding's number
# sentence-transformers' names of the ways to pool, old and new, and ours.
MODES = {"cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len_tokens": "mean by root of length",
         "weightedmean": "mean weighted by place", "lasttoken": "last"}  # fmt: skip
OLD_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
             "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
             "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}  # fmt: skip
ACTIVATIONS = {"torch.nn.modules.linear.Identity": nn.Identity, "torch.nn.modules.activation.Tanh": nn.Tanh,
               "torch.nn.modules.activation.ReLU": nn.ReLU, "torch.nn.modules.activation.GELU": nn.GELU}  # fmt: skip
HEADS = r"cls|lm_head|score|qa_outputs|classifier|vocab_(transform|layer_norm|projector)|decoder|pooler|head|" \
        r"(discriminator|generator)_(predictions|lm_head)|predictions|.*position_ids|shared"  # fmt: skip
NONE = ("resize", "crop", "interpolation", "mean", "std", "dim", "heads", "activation", "projector")  # flags
LONGEST = 1 << 20  # pieces of a text
USUAL_LENGTH = 512


@dataclass
class Reading:
    """What the files of a folder say beside the network: ways to pool, what follows, and how texts are cut."""

    modes: Sequence[str]
    after: Sequence[tuple[int, int, bool, str] | None]  # (in, out, bias, activation) of a Dense; None: Normalize
    tensors: dict[str, Tensor]
    names: Sequence[str]


class Sentences(nn.Module):
    """A transformer, pooled: (n, 2, t) int64, pieces and where there is one -> (n, d)."""

    def __init__(self, net: nn.Module, modes: Sequence[str], after: nn.Sequential) -> None:
        super().__init__()
        self.net, self.modes, self.after = net, modes, after
        self.main_blocks = outermost(self)
        self.mask = torch.ones(0, 0)

    def forward(self, pieces: Tensor) -> Tensor:
        """(n, 2, t) int64 -> (n, d). Raises InputError for a text that the network does not take."""
        ids, self.mask = pieces.unbind(1)
        with taking(f"texts of {ids.shape[1]} pieces"):
            hidden = self.net(input_ids=ids, attention_mask=self.mask).last_hidden_state
        return self.after(self.summary(hidden))

    def summary(self, hidden: Tensor) -> Tensor:
        """(n, t, d) of the last batch -> (n, d), by its pieces alone."""
        mask = self.mask.to(hidden)[..., None]
        return torch.cat([_pooled(mode, hidden, mask) for mode in self.modes], 1)


def _pooled(mode: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """(n, d); hidden: (n, t, d); mask: (n, t, 1), ones first."""
    count = mask.sum(1)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), count[:, 0].long() - 1]
    if mode == "max":
        return hidden.masked_fill(mask == 0, -torch.inf).amax(1)
    if mode == "weightedmean":
        mask = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)[:, None]
        return (hidden * mask).sum(1) / mask.sum(1)
    return (hidden * mask).sum(1) / (count if mode == "mean" else count.sqrt())


class Dense(nn.Module):
    """sentence-transformers' linear map after pooling."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(inputs, outputs, bias), ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)."""
        return self.activation(self.linear(x))


class Normalize(nn.Module):
    """Rows of norm 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return F.normalize(x)


def kind(clues: Clues) -> str | None:
    """The kind of text encoder that a config.json gives; None for others.

    Raises InputError: one whose network is code of its own.
    """
    name = clues.model_type
    if name not in (*ENCODERS, *DECODERS) or clues.given.arch is not None or clues.folder is None:
        return None
    code = clues.configs["config.json"].get("auto_map")
    if isinstance(code, Mapping) and "AutoModel" in code:
        raise InputError(
            f"config.json: its network is code of its own ({shown(code['AutoModel'])}), which is not run; "
            "give FILE.py:NAME that builds it, with weights="
        )
    return name


def plan(name: str, tensors: Mapping[str, Tensor], clues: Clues) -> tuple[str, Plan]:
    """(root, plan) of the encoder that a folder describes; every tensor that transformers takes for it is loaded.

    Raises InputError: a config far larger than the weights.
    """
    assert clues.folder is not None
    refuse_choices(clues, "texts", NONE)
    place = folders.rooted(clues.folder)
    config, model = config_of(name, len(tensors), _of_config(name, clues.configs["config.json"]), _class(name))
    said = _reading(clues.folder, name, clues)
    takes = "add_pooling_layer" in inspect.signature(model.__init__).parameters
    more = {"add_pooling_layer": False} if takes else {}
    create = partial(_made, model, config, more, said.modes, said.after)
    light = checked_on_meta(create, name, {**tensors, **said.tensors})
    net, used = filled(model, config, more, tensors, clues.notes)
    root, weights = state_of(net, used)
    weights = Weights({**weights.tensors, **said.tensors}, weights.keys)
    words = _words(place, clues, config, said)
    width = _width(light, config)
    return root, Plan(f"transformers {name}", create, weights, width, words, "tokens", heads=HEADS)


def _class(name: str) -> Any:
    """The class of transformers where it is not the kind's usual one: of T5 the encoder alone."""
    if name not in ("t5", "mt5"):
        return None
    from transformers.models.mt5.modeling_mt5 import MT5EncoderModel
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    return T5EncoderModel if name == "t5" else MT5EncoderModel


def _of_config(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "use_cache": False}


def _made(
    model: type[nn.Module], config: Any, more: Mapping[str, Any], modes: Sequence[str], after: Sequence[Any]
) -> Sentences:
    steps = [Normalize() if step is None else Dense(*step) for step in after]
    return Sentences(model(config, **more), modes, nn.Sequential(*steps))


def _width(light: Any, config: Any) -> int:
    """How many numbers a text gives. Raises InputError: a Dense that does not take what comes before it."""
    width = (getattr(config, "word_embed_proj_dim", None) or config.hidden_size) * len(light.modes)
    for step in light.after:
        if isinstance(step, Dense):
            if step.linear.in_features != width:
                raise InputError(
                    f"modules.json: a Dense of {step.linear.in_features} numbers follows {width}; is its "
                    "1_Pooling/config.json the one it was trained with?"
                )
            width = step.linear.out_features
    return int(width)


def _reading(folder: Path, name: str, clues: Clues) -> Reading:
    """What modules.json and the configs that it names say; the caller's word on pooling counts first."""
    given = {"cls": "cls", "mean": "mean", "max": "max", "last": "lasttoken"}.get(clues.given.pool or "")
    if not (folder / "modules.json").is_file():
        mode = given or ("mean" if name in ENCODERS else "lasttoken")
        if given is None:
            what = "the mean of its pieces" if mode == "mean" else "its last piece"
            clues.notes.append(f"no modules.json says what a text's vector is: {what} is taken; see pool=")
        return Reading([mode], [], {}, ["Transformer"])
    reading = Reading([], [], {}, [])
    after, names = list[Any](), list[str]()
    for entry in _modules(folder):
        names.append(_read_module(folder, entry, reading, after))
    if names[:1] != ["Transformer"] or names.count("Pooling") != 1 or names[1] != "Pooling":
        raise InputError(f"modules.json: {' -> '.join(names)}, expected Transformer -> Pooling and what follows")
    reading.after, reading.names = after, names
    if given is not None and [given] != list(reading.modes):
        clues.notes.append(f"pooled by pool={clues.given.pool}, not as 1_Pooling says ({_said(reading.modes)})")
        reading.modes = [given]
    return reading


def _modules(folder: Path) -> list[Mapping[str, Any]]:
    entries = folders.json_of(folder / "modules.json", list)
    if not entries or len(entries) > 16 or not all(isinstance(entry, Mapping) for entry in entries):
        raise InputError("modules.json: is no list of modules")
    return entries


def _read_module(folder: Path, entry: Mapping[str, Any], reading: Reading, after: list[Any]) -> str:
    """The name of a module; what it says goes into `reading`."""
    name = str(text("modules.json: type", entry.get("type")) or "").rpartition(".")[2]
    below = text("modules.json: path", entry.get("path")) or ""
    if name == "Pooling":
        reading.modes = _modes(folders.json_of(folders.inside(folder, below) / "config.json", dict))
    elif name == "Dense":
        after.append(_dense(folders.inside(folder, below), len(after), reading.tensors))
    elif name == "Normalize":
        after.append(None)
    elif name not in ("Transformer", "Dropout"):
        raise InputError(
            f"modules.json: a module {shown(name)}, which is not read; there are Transformer, Pooling, Dense, Normalize"
        )
    return name


def _modes(config: Mapping[str, Any]) -> list[str]:
    """Ways to pool, in the order in which their vectors are joined."""
    where = "1_Pooling/config.json"
    if config.get("include_prompt") is False:
        raise InputError(f"{where}: leaves the prompt out of the mean, which is not read; give the array of embeddings")
    modes: Any = config.get("pooling_mode")
    if modes is None:
        modes = [mode for old, mode in OLD_MODES.items() if flag(f"{where}: {old}", config.get(old))] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in list(MODES) for mode in modes):
        raise InputError(f"{where}: pooling_mode is {shown(modes)}, expected some of {', '.join(MODES)}")
    return modes


def _said(modes: Sequence[str]) -> str:
    return " and ".join(MODES[mode] for mode in modes)


def _dense(folder: Path, at: int, tensors: dict[str, Tensor]) -> tuple[int, int, bool, str]:
    config, where = folders.json_of(folder / "config.json", dict), f"{folder.name}/config.json"
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise InputError(f"{where}: {name} is {shown(config[name])}: vectors of pieces, not of texts")
    activation = choice(f"{where}: activation_function", config.get("activation_function"), ACTIVATIONS)
    activation = activation or "torch.nn.modules.activation.Tanh"
    path = next((folder / name for name in folders.WEIGHTS if (folder / name).is_file()), folder / folders.WEIGHTS[0])
    stored = containers.read(path).tree
    weight = stored.get("linear.weight") if isinstance(stored, Mapping) else None
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InputError(f"{folder.name}: has no linear.weight")
    tensors |= {f"after.{at}.{key}": tensor for key, tensor in stored.items() if key.startswith("linear.")}
    return weight.shape[1], weight.shape[0], "linear.bias" in stored, activation


def _words(place: Path, clues: Clues, config: Any, said: Reading) -> Words:
    """How texts are cut into pieces."""
    settings = _optional(place / "tokenizer_config.json")
    wishes = _optional(place / "sentence_bert_config.json")
    prompts = _optional((clues.folder or place) / "config_sentence_transformers.json")
    tokenizer = vocabularies.read(place, settings)
    length = _length(config, settings, wishes, clues)
    side = settings.get("truncation_side", "right")
    if side not in ("left", "right"):
        raise InputError(f"tokenizer_config.json: truncation_side is {shown(side)}, expected left or right")
    if length <= tokenizer.num_special_tokens_to_add(False):
        raise InputError(f"a text is to have {length} pieces at most, which the marks of its ends take")
    tokenizer.enable_truncation(length, direction=side)
    _end_marked(tokenizer, settings)
    return Words(
        tokenizer, length, int(config.vocab_size), _said(said.modes), _prompt(prompts, clues),
        bool(flag("sentence_bert_config.json: do_lower_case", wishes.get("do_lower_case"))),
        int(config.pad_token_id) if isinstance(config.pad_token_id, int) and config.pad_token_id >= 0 else 0,
        str(place),
    )  # fmt: skip


def _optional(path: Path) -> dict[str, Any]:
    return folders.json_of(path, dict) if path.is_file() else {}


def _length(config: Any, settings: Mapping[str, Any], wishes: Mapping[str, Any], clues: Clues) -> int:
    """Pieces of a text that are read: what sentence-transformers' config says, else the tokeniser's and network's."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is not None and config.model_type in FROM_PADDING:
        positions -= config.pad_token_id + 1
    wished = whole_number("sentence_bert_config.json: max_seq_length", wishes.get("max_seq_length"), 1, LONGEST)
    most = settings.get("model_max_length")
    most = int(most) if isinstance(most, (int, float)) and 0 < most <= LONGEST else None
    limits = [n for n in (wished or most, positions) if n is not None]
    if not limits:
        clues.notes.append(f"nothing says how long a text may be: {USUAL_LENGTH} pieces are read")
    return min(limits, default=USUAL_LENGTH)


def _end_marked(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """Raise InputError if texts are to end in a mark, by tokenizer_config.json, that tokenizer.json does not put."""
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, Mapping) else end
    if settings.get("add_eos_token") is True and (tokenizer.encode("a").tokens or [None])[-1] != end:
        raise InputError(
            f"tokenizer_config.json: add_eos_token, and tokenizer.json puts no {shown(end)} at the end; save the "
            "tokeniser again with transformers"
        )


def _prompt(settings: Mapping[str, Any], clues: Clues) -> str:
    """What is put before each text by default."""
    prompts, name = settings.get("prompts"), settings.get("default_prompt_name")
    if not isinstance(prompts, Mapping) or not prompts:
        return ""
    if name is None:
        some = [shown(key)[1:-1] for key, value in prompts.items() if value][:8]
        if some:
            clues.notes.append(f"has prompts ({', '.join(some)}), none by default: texts are read as they are")
        return ""
    return text("config_sentence_transformers.json: prompts", prompts.get(name)) or ""
