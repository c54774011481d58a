"""A model as training uses it: any open_clip model behind a few methods."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mulki.clip.models.adapters import Adapters, Level
from mulki.errors import InputError

TEXT_BATCH = 256

TextSplit = Literal["tokens", "pooled", "features"]


class Counts(NamedTuple):
    """Numbers of parameters: of a model, those that train, and those that a checkpoint has.

    Without those of adapters, which have a file of their own, but for those that train.
    """

    total: int
    trained: int
    stored: int


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
        adapters: of its weights, from `adapt`; then everything else is frozen.
        level: which of three models this is, where there are adapters: with all of them, with those
            of earlier tasks, or with none.
        autocast: makes a context in which the towers run, inside that of the caller.
    """

    clip: Any
    tokenizer: Callable[[Sequence[str]], Tensor]
    preprocess: Callable[[Any], Tensor]
    name: str
    packaged: tuple[str, ...] = ()
    config: dict[str, Any] | None = None
    split: TextSplit | None = None
    trunk: dict[str, Any] | None = None
    adapters: Adapters | None = None
    level: Level = "student"
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

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
        with self._current(), self.autocast():
            features = self.clip.encode_image(images)
        return F.normalize(features.float(), dim=-1)

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
        with torch.no_grad(), self._current(), self.autocast():
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
            with self._current(), self.autocast():
                encode = self.clip.text.proj if split == "pooled" else self.clip.encode_text
                features = encode(inputs)
        return F.normalize(features.float(), dim=-1)

    def _current(self) -> contextlib.AbstractContextManager[None]:
        if self.adapters is None or self.level == "student":
            return contextlib.nullcontext()
        return self.adapters.as_teacher(self.level)

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
            # CoCa has no such method, but its towers do.
            (getattr(self.clip, "lock_text_tower", None) or self.clip.text.lock)()
        if image:
            self.clip.visual.requires_grad_(False)  # timm's own lock leaves the projection out

    def adapt(
        self,
        rank: int,
        targets: Sequence[str] = (),
        alpha: float | None = None,
        *,
        fixed_a: bool = False,
    ) -> None:
        """Train adapters in place of the weights, see `mulki.clip.models.adapters.Adapters`."""
        self.adapters = Adapters(self.clip, rank, targets, alpha, fixed_a=fixed_a)

    def teacher(self, level: Level) -> VisionLanguageModel:
        """An earlier model that uses the weights of this one, which has adapters."""
        return replace(self, level=level, split=self._text_split())

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

    def parameter_counts(self) -> Counts:
        """How many parameters it has, how many train, and how many a checkpoint has."""
        trained = sum(p.numel() for p in self.trainable().values())
        sizes = {name: p.numel() for name, p in self.clip.named_parameters()}
        total = sum(sizes.values()) - (0 if self.adapters is None else self.adapters.parameters)
        left_out = self._left_out
        return Counts(
            total, trained, total - sum(n for k, n in sizes.items() if k.startswith(left_out))
        )

    @property
    def _left_out(self) -> tuple[str, ...]:
        # Where one of them trains, its weights differ from the package's.
        trains = any(name.startswith(self.packaged) for name in self.trainable())
        return () if trains else self.packaged

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

    def frozen_beside(self, student: VisionLanguageModel) -> VisionLanguageModel:
        """This model as a teacher of a student: in evaluation mode, not training, with its `split`.

        Both must have the same weights in `frozen_text` of the student.
        """
        self.clip.requires_grad_(False)
        self.eval()
        return replace(self, split=student._text_split())

    @property
    def frozen_text(self) -> list[str]:
        """Names of the weights that `text_inputs` computes with, none of which trains."""
        if self._text_split() == "tokens":
            return []
        trains = self.trainable()
        return [
            name
            for name in self.clip.state_dict()
            if name not in trains and not name.startswith(("visual.", "logit_"))
        ]

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
        """The state dict to save, on the CPU; adapters are merged into their weights.

        Keys in `packaged` are left out, unless one of them trains: then its weights differ from the
        package's. All processes must call this for a sharded model; only the first gets the
        weights, the others an empty dict.

        Args:
            whole: keep the keys in `packaged` in any case.
        """
        packaged = () if whole else self._left_out
        state = _whole_state(self.clip)
        if self.adapters is not None:
            state = self.adapters.merged(state)
        return {
            name: value.detach().cpu().contiguous()
            for name, value in state.items()
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
