"""What the losses over image-text pairs share: ranks, checks, and how a rank's part is reported.

Every rank holds rows of the batch and computes the sum S_r of the losses of its own rows against
all columns. The loss of the batch is sum_r S_r / N for N rows in all. A rank differentiates
``W / N * S_r``: data parallelism averages the gradients of the W ranks, and gathered columns bring
theirs home, so that parameters get the gradient of the batch's loss, however many ranks there are
and however many rows each has. What is returned as the value is another matter, see
`PairLoss.reported`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mulki.distributed import collectives
from mulki.ops import checks, torch_private
from mulki.ops.logits import Operands
from mulki.representation import arguments_shown
from mulki.similarity import Similarity

# Half precision leaves rows that were normalised within this of norm 1.
NORM_TOLERANCE = 0.02


@dataclass(frozen=True, eq=False)
class Pairs:
    """One model's features of this rank's pairs, and its numbers.

    `prefix` is that of its arguments: "" for the student, "dist_" and "prev_" for teachers.
    """

    prefix: str
    images: Tensor  # [n, D]
    texts: Tensor  # [n, D]
    scale: Tensor | float
    bias: Tensor | float | None = None

    def __post_init__(self) -> None:
        # open_clip has models whose scale and bias are of shape [1].
        for name in ("scale", "bias"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() == 1:
                object.__setattr__(self, name, value.reshape(()))

    def operands(self) -> Operands:
        """What the operators on pairs take."""
        return self.images, self.texts, self.scale

    def features(self) -> dict[str, Tensor]:
        """The tensors by the names of their arguments."""
        kinds = ("image", self.images), ("text", self.texts)
        return {f"{self.prefix}{kind}_features": t for kind, t in kinds}

    def check(self, student: Pairs | None = None) -> None:
        """Raise a TypeError or a ValueError that names the argument; a teacher has a `student`."""
        images, texts = self.features()
        names = images, texts, self._name("scale")
        checks.inputs(self.images, self.texts, self.scale, names)
        checks.matching_rows(self.images, self.texts, names)
        if self.bias is not None:
            checks.scalar(self._name("bias"), self.bias, self.images.device)
        if student is None:
            return
        if self.images.shape[0] != student.images.shape[0]:
            raise ValueError(
                f"{images}: got {self.images.shape[0]} rows, wanted {student.images.shape[0]} as "
                f"image_features has: a teacher sees the student's batch"
            )
        if self._is_double() != student._is_double():
            raise TypeError(
                f"{images}: got dtype {self.images.dtype}, wanted {student.images.dtype} as "
                f"image_features has; cast one to the other"
            )
        if self.images.device != student.images.device:
            raise ValueError(
                f"{images}: got device {self.images.device}, wanted {student.images.device} as "
                f"image_features has; move it there"
            )

    def _is_double(self) -> bool:
        return self.images.dtype == torch.float64

    def _name(self, number: str) -> str:
        return f"{self.prefix}logit_{number}"

    def detached(self) -> Pairs:
        """The same, cut from the autograd graph, as a teacher is."""
        parts: list[Any] = [self.images, self.texts, self.scale, self.bias]  # not yet checked
        return Pairs(self.prefix, *(p.detach() if isinstance(p, Tensor) else p for p in parts))


@dataclass(frozen=True, eq=False)
class Columns:
    """What this rank's rows are compared with: all ranks' rows, in the order of the ranks."""

    pairs: Pairs
    images: Tensor  # [N, D]
    texts: Tensor  # [N, D]

    def of_images(self) -> Similarity:
        """This rank's images against all texts, [n, N]."""
        return Similarity(self.pairs.images, self.texts, self.pairs.scale)

    def of_texts(self) -> Similarity:
        """This rank's texts against all images, [n, N]."""
        return Similarity(self.pairs.texts, self.images, self.pairs.scale)


@dataclass(frozen=True)
class Shard:
    """This rank's place in the batch."""

    sizes: Sequence[int]  # rows of every rank
    rank: int

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def rows(self) -> int:
        return self.sizes[self.rank]

    @property
    def offset(self) -> int:
        """The batch's row that is this rank's first."""
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)


class PairLoss(nn.Module):
    """Base of the losses over pairs. It has no parameters and keeps no tensors of a batch."""

    softmax = True  # over the batch, so that a batch of one pair teaches nothing

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # In open_clip these make the loss.
        hooks = {"get_logits", "get_ground_truth", "dist_loss"} & vars(cls).keys()
        if hooks and cls.forward.__module__.startswith("mulki.") and "forward" not in vars(cls):
            raise TypeError(
                f"{cls.__name__}: forward does not call {', '.join(sorted(hooks))}, so it changes "
                "nothing; define forward too"
            )

    def __init__(
        self,
        rank: int | None,
        world_size: int | None,
        group: collectives.Group | None,
        legacy: Mapping[str, str],  # by the name of an argument, what becomes of it
    ) -> None:
        super().__init__()
        self.group = group
        self._given = {"rank": rank, "world_size": world_size}
        self._said: set[str] = set()
        if legacy:
            told = ", ".join(f"{name} ({what})" for name, what in legacy.items())
            warnings.warn(
                f"{type(self).__name__}: arguments of other versions of open_clip: {told}",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        return arguments_shown(self, **self._given)

    @property
    def rank(self) -> int:
        return collectives.world(self.group).rank

    @property
    def world_size(self) -> int:
        return collectives.world(self.group).size

    def shard(self, student: Pairs, *teachers: Pairs, **facts: object) -> Shard:
        """Check the arguments on all ranks together and find this rank's rows among theirs.

        Raises:
            TypeError, ValueError: on all ranks, if one of them has a problem, or if they disagree
                in what must be alike: the loss and its options, widths and dtypes.
        """
        problem: Exception | None = None
        rows, device = 0, None
        facts = {"loss": type(self).__name__, **facts}
        try:
            student.check()
            rows, device = student.images.shape[0], student.images.device
            for teacher in teachers:
                teacher.check(student)
            self._check_ranks()
            facts.update(_facts((student, *teachers)))
        except (TypeError, ValueError) as error:
            problem = error
        sizes = collectives.agree(self.group, rows=rows, device=device, problem=problem, **facts)
        shard = Shard(sizes, self.rank)
        if shard.total == 0:
            raise ValueError("image_features: got no rows on any rank, wanted at least one pair")
        if torch_private.has_values(student.images):
            self._look(shard, (student, *teachers))
        return shard

    def _check_ranks(self) -> None:
        actual = {"rank": self.rank, "world_size": self.world_size}
        for name, given in self._given.items():
            if given is None or given == actual[name]:
                continue
            if self.world_size > 1:
                there = f"the process group has {name} {actual[name]}; leave {name} out"
            else:
                there = (
                    "there is no process group of several ranks; call "
                    "torch.distributed.init_process_group before the loss"
                )
            raise ValueError(f"{name}: got {given}, but {there}")

    def _look(self, shard: Shard, models: Sequence[Pairs]) -> None:
        """Warn of what is allowed but seldom meant, once each."""
        if self.softmax and shard.total == 1 and shard.rank == 0:
            self.say_once(
                "one pair",
                "got a batch of one pair: a softmax over one is constant, so the loss is zero and "
                "teaches nothing; use a larger batch",
            )
        if "norms" in self._said:
            return
        self._said.add("norms")  # reading norms waits for a GPU: at the first call alone
        for model in models:
            for name, features in model.features().items():
                norms = features.detach().float().norm(dim=1)
                if norms.numel() and not ((norms - 1).abs() <= NORM_TOLERANCE).all():
                    self.say_once(
                        "not normalised",
                        f"{name}: got rows of norm {norms.min():.4g} to {norms.max():.4g}, wanted "
                        f"1; normalise them with torch.nn.functional.normalize(x, dim=-1), or the "
                        f"logits are no scaled cosines",
                    )

    def say_once(self, what: str, message: str) -> None:
        """A warning that this module gives once."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=2)

    def columns(self, shard: Shard, pairs: Pairs) -> Columns:
        """All ranks' features of one model; gradients of all ranks flow back to where they are."""
        images, texts = (self.gathered(shard, t) for t in (pairs.images, pairs.texts))
        return Columns(pairs, images, texts)

    def gathered(self, shard: Shard, rows: Tensor) -> Tensor:
        """[n, D] of this rank to [N, D] of all."""
        if shard.world == 1:
            return rows
        differentiable = rows.requires_grad and torch.is_grad_enabled()
        gather: Callable[..., Tensor] = (
            collectives.gather_rows_with_grad if differentiable else collectives.gather_rows
        )
        return gather(rows, shard.sizes, self.group)

    def reported(self, shard: Shard, sums: Mapping[str, Tensor], own: bool) -> dict[str, Tensor]:
        """Losses to differentiate, from the sums over this rank's rows.

        Their gradients are as the head of this module says. Their values are the mean over this
        rank's rows (`own`), or over all.
        """
        losses = {name: value * (shard.world / shard.total) for name, value in sums.items()}
        if shard.world == 1 or (own and len(set(shard.sizes)) == 1):
            return losses
        values = torch.stack([value.detach() for value in sums.values()])
        if own:
            values = values / max(shard.rows, 1)
        else:
            values = collectives.sum_of_ranks(values, self.group) / shard.total
        return {
            name: _WithValue.apply(loss, value)
            for (name, loss), value in zip(losses.items(), values, strict=True)
        }


def _facts(models: Sequence[Pairs]) -> dict[str, object]:
    facts: dict[str, object] = {"device type": models[0].images.device.type}
    grads = ""
    for model in models:
        for name, features in model.features().items():
            facts[f"{name} dtype"] = str(features.dtype).removeprefix("torch.")
            facts[f"{name} width"] = features.shape[1]
            grads += "ny"[features.requires_grad and torch.is_grad_enabled()]
    # Whether a tensor has a gradient decides whether there is a collective in backward.
    return {**facts, "features that require grad": grads}


class _WithValue(torch.autograd.Function):
    """`value`, with the gradient of `loss`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.to(loss.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
