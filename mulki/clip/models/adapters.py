"""Low-rank adapters of the weights of a model, beside which everything else is frozen.

    W' = W + K + alpha / r  B A

W [out, in] stays as it is. A [r, in] and B [out, r] are learned in a task (LoRA, arXiv 2106.09685).
K is the sum of the products of all tasks before, as factors K_B K_A. So one set of weights serves
three models: the original one is W, the previous one W + K, and the student W'.

W' is computed from its factors by the same operations in training and when a checkpoint is
written, so the checkpoint's features are the student's, to the bit on a CPU. The package `peft`
would not do: for `nn.MultiheadAttention` it adds the product to W and takes it away again in each
forward pass. W then moves by a rounding each time, and is another `nn.Parameter` afterwards, which
neither a teacher with the same weights nor FSDP can follow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from mulki.distributed.parts import set_whole, whole
from mulki.errors import InputError

Level = Literal["original", "previous", "student"]

_FACTORS = ("a", "b", "kept_a", "kept_b")
_MARK = ".parametrizations."


class _LowRank(nn.Module):
    """The change of one weight: a parametrization for torch's `parametrize`."""

    kept_a: Tensor
    kept_b: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        rows, columns = len(weight), weight[0].numel()

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=weight.device)

        self.a = nn.Parameter(empty(rank, columns))
        self.b = nn.Parameter(empty(rows, rank))
        # Buffers: FSDP leaves them whole, so that they can grow.
        self.register_buffer("kept_a", empty(0, columns))
        self.register_buffer("kept_b", empty(rows, 0))
        self.bytes_of_weight = weight.nbytes
        self._scale = scale
        self.level: Level = "student"  # which of the three models the weight is at present

    def forward(self, weight: Tensor) -> Tensor:
        if isinstance(weight, DTensor):
            return weight  # not in a forward pass of FSDP's: open_clip asks for the dtype alone
        factors = {name: getattr(self, name) for name in _FACTORS}
        return _changed(weight, factors, self._scale, self.level)


def _changed(
    weight: Tensor, factors: Mapping[str, Tensor], scale: float, level: Level = "student"
) -> Tensor:
    a, b = factors["kept_a"], factors["kept_b"]
    if level == "student":
        a, b = torch.cat([a, factors["a"]]), torch.cat([b, scale * factors["b"]], dim=1)
    if level == "original" or not len(a):
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return (weight.float() + (b @ a).view_as(weight)).to(weight.dtype)


class Adapted(NamedTuple):
    """A weight with an adapter.

    Attributes:
        module: that has the weight.
        frozen: W, live.
        a: [r, in], live.
        b: [out, r], live.
    """

    module: nn.Module
    frozen: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter


class Adapters:
    """The adapters of a model, made in place; all other parameters are frozen.

    Args:
        clip: the model. Adapted are weights that train, of linear layers, of 1 x 1 convolutions and
            of the projections of `nn.MultiheadAttention`.
        rank: r.
        targets: names of modules, or the last parts of their names, as the package `peft` takes
            them; all that can be adapted by default.
        alpha: the product counts alpha / r times; r by default.
        fixed_a: whether A does not train.

    Raises:
        InputError: a target that is no such module, or one that is narrower than the rank.
    """

    def __init__(
        self,
        clip: nn.Module,
        rank: int,
        targets: Sequence[str] = (),
        alpha: float | None = None,
        *,
        fixed_a: bool = False,
    ):
        self._clip = clip
        self._scale = 1.0 if alpha is None else alpha / rank
        self._parts: dict[str, _LowRank] = {}
        chosen = _chosen(clip, targets)
        _check_rank(chosen, rank)
        clip.requires_grad_(False)
        for module_name, (module, weight_name) in chosen.items():
            part = _LowRank(getattr(module, weight_name), rank, self._scale)
            part.a.requires_grad_(not fixed_a)
            parametrize.register_parametrization(module, weight_name, part, unsafe=True)
            self._parts[f"{module_name}.{weight_name}"] = part

    @property
    def bytes_in_a_step(self) -> int:
        """Of the weights W' that a forward pass keeps for the backward pass."""
        return sum(part.bytes_of_weight for part in self._parts.values())

    @property
    def bytes_of_directions(self) -> int:
        """Of a gradient of each weight and the moments of its inputs, in float32.

        Of the largest moments two copies in float64 come on top.
        """
        sizes = [(len(part.a[0]), len(part.b)) for part in self._parts.values()]
        largest = max((inputs for inputs, _ in sizes), default=0)
        return 4 * sum(n * (n + outputs) for n, outputs in sizes) + 16 * largest**2

    def __len__(self) -> int:
        """How many weights have one."""
        return len(self._parts)

    @property
    def parameters(self) -> int:
        """How many parameters they have."""
        return sum(part.a.numel() + part.b.numel() for part in self._parts.values())

    def weights(self) -> dict[str, Adapted]:
        """The weights with adapters, by name."""
        found = {}
        for name, part in self._parts.items():
            path, _, weight_name = name.rpartition(".")
            module = self._clip.get_submodule(path)
            lists: Any = module.parametrizations
            found[name] = Adapted(module, lists[weight_name].original, part.a, part.b)
        return found

    @torch.no_grad()
    def start_task(self, seed: int, *, keep: bool) -> None:
        """Begin a task with a product of zero: A at random, as linear layers begin, and B = 0.

        Args:
            seed: of A.
            keep: add the product of the task before to what is kept.
        """
        generator = torch.Generator().manual_seed(seed)
        for part in self._parts.values():
            if keep:
                a, b = whole(part.a), self._scale * whole(part.b)
                part.kept_a = torch.cat([part.kept_a, a])
                part.kept_b = torch.cat([part.kept_b, b], dim=1)
            drawn = torch.empty(part.a.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            set_whole(part.a, drawn.to(part.a.device))
            part.b.zero_()

    def state(self) -> dict[str, Tensor]:
        """The factors, by the name of their weight; not copies, and sharded by FSDP."""
        return {
            f"{name}.{factor}": getattr(part, factor).detach()
            for name, part in self._parts.items()
            for factor in _FACTORS
        }

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state is of adapters of the same weights and rank."""
        mine = self.state()
        return state.keys() == mine.keys() and all(
            state[f"{name}.a"].shape == part.a.shape
            and state[f"{name}.b"].shape == part.b.shape
            and state[f"{name}.kept_a"].shape[1:] == part.a.shape[1:]
            and state[f"{name}.kept_b"].shape == (len(part.b), len(state[f"{name}.kept_a"]))
            for name, part in self._parts.items()
        )

    def checkpoint(self) -> dict[str, Tensor]:
        """`state` on the CPU, whole. All processes have to call it."""
        return {name: whole(value).cpu().contiguous() for name, value in self.state().items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set what `state` returned, as whole tensors."""
        for name, part in self._parts.items():
            for factor in ("a", "b"):
                set_whole(getattr(part, factor), state[f"{name}.{factor}"].to(part.a.device))
            for factor in ("kept_a", "kept_b"):
                setattr(part, factor, state[f"{name}.{factor}"].to(part.a.device))

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the model as an ordinary one has it: W' under the name of W."""
        found = {}
        for name, value in state.items():
            module, mark, rest = name.partition(_MARK)
            weight, _, piece = rest.partition(".")
            if not mark:
                found[name] = value
            elif piece == "original":
                factors = {f: state[f"{module}{_MARK}{weight}.0.{f}"] for f in _FACTORS}
                found[f"{module}.{weight}"] = _changed(value, factors, self._scale)
        return found

    @contextlib.contextmanager
    def as_teacher(self, level: Level) -> Iterator[None]:
        """While it lasts, the model is this teacher, in evaluation mode."""
        # What is recomputed in a backward pass would be the student's.
        names = "training", "grad_checkpointing"
        switches = [(m, n) for m in self._clip.modules() for n in names if getattr(m, n, False)]
        for part in self._parts.values():
            part.level = level
        for module, name in switches:
            setattr(module, name, False)
        try:
            yield
        finally:
            for part in self._parts.values():
                part.level = "student"
            for module, name in switches:
                setattr(module, name, True)


def _adaptable(clip: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    # Modules, and the name of that of their weights that can have an adapter.
    found = {}
    for name, module in clip.named_modules():
        weight = ""
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weight = "in_proj_weight"
        elif isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        ):
            weight = "weight"
        if weight and getattr(module, weight).requires_grad:
            found[name] = module, weight
    return found


def _chosen(clip: nn.Module, targets: Sequence[str]) -> dict[str, tuple[nn.Module, str]]:
    known = _adaptable(clip)
    if not targets:
        return known
    chosen: set[str] = set()
    for target in targets:
        # A module of attention stands for its projection of the output too.
        parts = {
            name
            for name in known
            if any(f".{part}".endswith(f".{target}") for part in (name, name.rpartition(".")[0]))
        }
        if not parts:
            ends = sorted({name.rpartition(".")[2] for name in known})
            raise InputError(
                f"--lora-targets: got {target!r}, but no linear layer, 1 x 1 convolution or "
                f"attention that trains has a name with this end; wanted some of "
                f"{', '.join(ends[:8])}"
            )
        chosen |= parts
    return {name: of for name, of in known.items() if name in chosen}


def _check_rank(chosen: Mapping[str, tuple[nn.Module, str]], rank: int) -> None:
    widths = {
        f"{name}.{weight}": min(len(value), value[0].numel())
        for name, (module, weight) in chosen.items()
        for value in [getattr(module, weight)]
    }
    narrowest = min(widths, key=lambda name: widths[name], default="")
    if narrowest and rank > widths[narrowest]:
        raise InputError(
            f"--lora-rank: got {rank}, but {narrowest} has {widths[narrowest]} rows or columns; "
            "pass at most as many, or --lora-targets without it"
        )
