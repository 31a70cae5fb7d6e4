"""ReviewKD's fusion: the student's features, merged from the deepest to the shallowest, in the teacher's shapes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax import models
from ltkd_jax.models.linear import linear
from ltkd_jax.models.network import Initialisers, Layers

_MOST_CHANNELS = 512  # between a fusion's two convolutions


def maps(features: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """A model's features as maps `[B, h, w, c]`: its stages, from the first, and the pooled vector as a 1×1 map.

    >>> [x.shape for x in maps({"stage1": jnp.zeros((2, 4, 4, 8)), "pooled": jnp.zeros((2, 8))})]
    [(2, 4, 4, 8), (2, 1, 1, 8)]
    """
    *stages, pooled = (
        feature
        for _, feature in sorted(
            features.items(), key=lambda item: (item[0] == "pooled", item)
        )
    )
    return (*stages, pooled[:, None, None, :])


class Fusion(Layers):
    """Attention-based fusion: the student's features in, features of the teacher's shapes out.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, section 3, as in its code: from the
    deepest on, a 1×1 convolution brings a feature to a common number of channels, attention with a map for each mixes
    it with what came of the deeper ones, and a 3×3 convolution brings it to the teacher's channels.

    Attributes:
      targets: (size, channels) of the teacher's features, from the first stage to the pooled vector.
    """

    targets: tuple[tuple[int, int], ...]

    initialisers = Initialisers(
        conv=nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    )

    @nn.compact
    def __call__(
        self, features: tuple[jax.Array, ...], *, train: bool
    ) -> tuple[jax.Array, ...]:
        """Maps `[B, size, size, channels]` of the targets, from those of `maps(student's features)`."""
        common = min(_MOST_CHANNELS, features[-1].shape[-1])
        fused, deeper = [], None
        for level in reversed(range(len(features))):
            size, channels = self.targets[level]
            x = self.conv_norm(
                features[level], train, common, 1, name=f"level{level + 1}", index=1
            )
            if deeper is not None:
                x = self._attend(
                    x, _nearest(deeper, x.shape[1]), f"level{level + 1}_attention"
                )
            deeper = _nearest(x, size)
            fused.append(
                self.conv_norm(
                    deeper, train, channels, 3, name=f"level{level + 1}", index=2
                )
            )
        return tuple(reversed(fused))

    def _attend(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
        weights = nn.sigmoid(
            linear(
                jnp.concatenate([x, y], axis=-1), 2, precision=self.precision, name=name
            )
        )
        own, other = jnp.split(weights.astype(x.dtype), 2, axis=-1)
        return x * own + y * other


def _nearest(x: jax.Array, size: int) -> jax.Array:
    """`[B, size, size, c]` by the nearest pixel, as PyTorch chooses it."""
    index = jnp.arange(size) * x.shape[1] // size
    return x if size == x.shape[1] else x[:, index][:, :, index]


@dataclasses.dataclass(frozen=True)
class Reviewed:
    """A student with a fusion beside it: initialised and applied like a model, as which it gives the student's logits.

    Both have their parameters under `student` and `fusion`, and so train together; evaluation does not use the fusion.

    Attributes:
      student: a model of `models.create`.
      fusion: a `Fusion`.
    """

    student: nn.Module
    fusion: Fusion

    def init(self, key: jax.Array, images: jax.Array, *, train: bool) -> dict[str, Any]:
        """Variables of both; the student's are those that it gets alone."""
        student = self.student.init(key, images, train=train)
        _, features, _ = models.apply_with_features(
            self.student, student, images, train=False
        )
        fusion = self.fusion.init(
            jax.random.fold_in(key, 1), maps(features), train=train
        )
        return {
            kind: {"student": student[kind], "fusion": fusion[kind]} for kind in student
        }

    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        *,
        train: bool,
        mutable: Sequence[str] = (),
    ) -> Any:
        """The student's logits; with `mutable` also its updated collections, beside the fusion's as they were."""
        student = _part(variables, "student")
        if not mutable:
            return self.student.apply(student, images, train=train)
        logits, updates = self.student.apply(
            student, images, train=train, mutable=mutable
        )
        return logits, {
            kind: {**variables[kind], "student": new} for kind, new in updates.items()
        }

    def apply_with_features(
        self, variables: Mapping[str, Any], images: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...], dict[str, Any]]:
        """In training mode: the student's logits, its fused features, and both's updated batch statistics."""
        mutable = ("batch_stats",)
        logits, features, student = models.apply_with_features(
            self.student,
            _part(variables, "student"),
            images,
            train=True,
            mutable=mutable,
        )
        fused, fusion = self.fusion.apply(
            _part(variables, "fusion"), maps(features), train=True, mutable=mutable
        )
        return (
            logits,
            fused,
            {
                "batch_stats": {
                    "student": student["batch_stats"],
                    "fusion": fusion["batch_stats"],
                }
            },
        )


def _part(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {kind: tree[name] for kind, tree in variables.items()}


def reviewed(
    student: nn.Module, teacher: nn.Module, image_shape: tuple[int, int, int]
) -> Reviewed:
    """A student with the fusion that compares it with a teacher.

    Args:
      student, teacher: models of `models.create`.
      image_shape: height, width and channels.

    Raises:
      ValueError: they have another number of stages, so that no stage of one answers to one of the other.

    >>> pair = models.create("resnet8", 10), models.create("resnet14", 10)
    >>> reviewed(*pair, (8, 8, 1)).fusion.targets
    ((8, 16), (4, 32), (2, 64), (1, 64))
    """
    of_student, of_teacher = (
        _shapes(model, image_shape) for model in (student, teacher)
    )
    if len(of_student) != len(of_teacher):
        raise ValueError(
            f"reviewkd compares stage with stage: the student has {len(of_student) - 1}, the teacher "
            f"{len(of_teacher) - 1}: choose another pair"
        )
    own = {name: getattr(student, name) for name in ("dtype", "precision", "axis_name")}
    return Reviewed(student, Fusion(targets=of_teacher, **own))


def _shapes(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[tuple[int, int], ...]:
    """(size, channels) of each feature."""

    def features(images: jax.Array) -> tuple[jax.Array, ...]:
        variables = model.init(jax.random.key(0), images, train=False)
        return maps(
            models.apply_with_features(model, variables, images, train=False)[1]
        )

    found = jax.eval_shape(
        features, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    )
    return tuple((feature.shape[1], feature.shape[-1]) for feature in found)
