"""What the zoo's own networks share: a stem, stages in a row, the head, and the methods that timm's users call.

ResNetLastBN, which is timm's ResNet, has these methods from there.
Shapes: B images, C channels, H x W pixels, D features, K classes.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from condzoo.models.head import drop_head, forward_head, set_classifier


class StagedNetwork(nn.Module):
    """A stem, the stages that `feature_info` names, what follows them, and the head that `attach_head` gives.

    A subclass overrides `forward_stem` and `forward_tail` where it has them.
    """

    fc: nn.Module
    feature_info: list[dict[str, Any]]
    grad_checkpointing = False

    def forward_stem(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the first stage's input
        """What comes before the first stage."""
        return x

    def forward_tail(self, x: Tensor) -> Tensor:  # the last stage's output -> [B, D, H', W']
        """What comes between the last stage and the head."""
        return x

    def drop_tail(self) -> None:
        """Leave out what comes between the last stage and the head."""

    def forward_features(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, D, H', W'], of an MLP [B, D]
        """The body: everything before pooling."""
        x = self.forward_stem(x)
        for info in self.feature_info:
            x = self._forward_stage(info["module"], x)
        return self.forward_tail(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # [B, D, H', W'] -> [B, K]
        """Pooling, last BN, dropout, classifier; `pre_logits` stops before the classifier."""
        return forward_head(self, x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of stages, as timm's networks give them.

        Args:
            x: [B, C, H, W].
            indices: of stages, from 0, or from -1 backwards; a number takes that many last ones, None all.
            norm: apply what follows the last stage (PreResNet's final BN and ReLU) to its output.
            stop_early: run no stage after the last one asked for.
            output_fmt: only "NCHW".
            intermediates_only: leave out the first of the two results.

        Returns:
            What `forward_features` returns (with `stop_early` the output of the last stage that ran), and the list.

        Raises:
            ValueError: another `output_fmt`.
            AssertionError: an index that no stage has (timm's).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.feature_info), _as_list(indices))
        end = len(self.feature_info) - 1
        found: list[Tensor] = []
        x = self.forward_stem(x)
        for i, info in enumerate(self.feature_info[: last + 1] if stop_early else self.feature_info):
            x = self._forward_stage(info["module"], x)
            if i in taken:
                found.append(self.forward_tail(x) if norm and i == end else x)
        if intermediates_only:
            return found
        return (self.forward_tail(x) if not stop_early or last == end else x), found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages after the last one asked for, as timm's networks do it.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: leave out what follows the last stage.
            prune_head: leave out last BN and classifier; they go in any case with the last stage.

        Returns:
            The indices, counted from 0.
        """
        taken, last = feature_take_indices(len(self.feature_info), _as_list(indices))
        for info in self.feature_info[last + 1 :]:
            self.set_submodule(info["module"], nn.Sequential())
        cut = last < len(self.feature_info) - 1
        if prune_norm or cut:
            self.drop_tail()
        if prune_head or cut:
            drop_head(self, self.feature_info[last]["num_chs"])
        return taken

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last linear layer, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; the last BN stays."""
        set_classifier(self, num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of storing its activations."""
        self.grad_checkpointing = enable

    def forward_checkpointed(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A stage that is recomputed in backward, block by block."""
        return checkpoint_seq(stage, x)

    def _forward_stage(self, name: str, x: Tensor) -> Tensor:
        stage = self.get_submodule(name)
        return self.forward_checkpointed(stage, x) if self.grad_checkpointing and self.training else stage(x)


def _as_list(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return indices if indices is None or isinstance(indices, int) else list(indices)
