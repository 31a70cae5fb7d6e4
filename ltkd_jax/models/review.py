"""ReviewKD's fusion, which maps the student's features to the teacher's shapes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ltkd_jax import models
from ltkd_jax.models.linear import linear
from ltkd_jax.models.network import Initialisers, Layers

# Limit of the channels between the two convolutions of a level.
_MAX_CHANNELS = 512


def feature_maps(features: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Returns a model's features in order, each as a map `[B, h, w, c]`.

    The stages come first; the pooled vector is last, as a map of one pixel.

    Args:
      features: see `models.apply_with_features`.

    >>> features = {"pooled": jnp.zeros((2, 8)), "stage1": jnp.zeros((2, 4, 4, 8))}
    >>> [x.shape for x in feature_maps(features)]
    [(2, 4, 4, 8), (2, 1, 1, 8)]
    """
    stage_names = sorted(name for name in features if name != "pooled")
    stages = [features[name] for name in stage_names]
    return (*stages, features["pooled"][:, None, None, :])


class Fusion(Layers):
    """Fuses the student's features by attention, from the deepest to the shallowest.

    At each level, a 1×1 convolution brings the student's feature to a common number of
    channels, attention mixes it with the fused deeper levels, and a 3×3 convolution
    brings it to the teacher's channels.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, section
    3, as the authors' code implements it.

    Attributes:
      targets: (size, channels) of the teacher's features, from the first stage to the
        pooled vector.
    """

    targets: tuple[tuple[int, int], ...]

    initialisers = Initialisers(
        conv_kernel=nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    )

    @nn.compact
    def __call__(
        self, features: tuple[jax.Array, ...], *, train: bool
    ) -> tuple[jax.Array, ...]:
        """Returns a map `[B, size, size, channels]` for each target.

        Args:
          features: of the student, see `feature_maps`.
          train: whether batch norm uses the statistics of the batch.
        """
        common_width = min(_MAX_CHANNELS, features[-1].shape[-1])
        outputs = []
        fused = None
        for level in reversed(range(len(features))):
            size, channels = self.targets[level]
            name = f"level{level + 1}"
            x = self.conv_norm(
                features[level], train, common_width, 1, name=name, index=1
            )
            if fused is not None:
                deeper = _resize_nearest(fused, x.shape[1])
                x = self._attend(x, deeper, f"{name}_attention")
            fused = _resize_nearest(x, size)
            outputs.append(
                self.conv_norm(fused, train, channels, 3, name=name, index=2)
            )
        return tuple(reversed(outputs))

    def _attend(self, x: jax.Array, deeper: jax.Array, name: str) -> jax.Array:
        """Returns both maps `[B, h, w, c]`, weighted per pixel and added."""
        both = jnp.concatenate([x, deeper], axis=-1)
        weights = nn.sigmoid(linear(both, 2, precision=self.precision, name=name))
        # `linear` computes in float32; bfloat16 activations must stay bfloat16.
        x_weight, deeper_weight = jnp.split(weights.astype(x.dtype), 2, axis=-1)
        return x * x_weight + deeper * deeper_weight


def _resize_nearest(x: jax.Array, size: int) -> jax.Array:
    """Returns `[B, size, size, c]` of nearest pixels, chosen as in PyTorch."""
    if size == x.shape[1]:
        return x
    # PyTorch rounds i · h / size down. `jax.image.resize` takes (i + ½) · h / size.
    index = jnp.arange(size) * x.shape[1] // size
    return x[:, index][:, :, index]


@dataclasses.dataclass(frozen=True)
class StudentWithFusion:
    """Holds a student and its fusion, which are trained together, as one model.

    It has the methods of `models.Model`. Its variables have the parts `student` and
    `fusion`. `apply` returns the student's logits and does not use the fusion.

    Attributes:
      student: a model of `models.create`.
      fusion: a `Fusion`.
    """

    student: models.Model
    fusion: Fusion

    def init(self, key: jax.Array, images: jax.Array, *, train: bool) -> dict[str, Any]:
        """Returns new variables of the student and of the fusion.

        Those of the student are the same as without a fusion.
        """
        student = self.student.init(key, images, train=train)
        _, features, _ = models.apply_with_features(
            self.student, student, images, train=False
        )
        # `key` itself was used for the student.
        fusion_key = jax.random.fold_in(key, 1)
        fusion = self.fusion.init(fusion_key, feature_maps(features), train=train)
        return {
            collection: {"student": student[collection], "fusion": fusion[collection]}
            for collection in student
        }

    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        *,
        train: bool,
        mutable: Sequence[str] = (),
    ) -> Any:
        """Returns the student's logits; with `mutable`, also the updated collections.

        In these, only the student's part is updated.
        """
        student = _select(variables, "student")
        if not mutable:
            return self.student.apply(student, images, train=train)
        logits, student_updates = self.student.apply(
            student, images, train=train, mutable=mutable
        )
        updates = {
            collection: {**variables[collection], "student": student_update}
            for collection, student_update in student_updates.items()
        }
        return logits, updates

    def apply_with_features(
        self, variables: Mapping[str, Any], images: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...], dict[str, Any]]:
        """Applies the student and the fusion in training mode.

        Args:
          variables: of the student and of the fusion.
          images: float `[B, H, W, channels]`.

        Returns:
          (logits, fused features, updates), where updates are the new batch statistics
          of both.
        """
        mutable = ("batch_stats",)
        logits, features, student_updates = models.apply_with_features(
            self.student,
            _select(variables, "student"),
            images,
            train=True,
            mutable=mutable,
        )
        fused, fusion_updates = self.fusion.apply(
            _select(variables, "fusion"),
            feature_maps(features),
            train=True,
            mutable=mutable,
        )
        batch_stats = {
            "student": student_updates["batch_stats"],
            "fusion": fusion_updates["batch_stats"],
        }
        return logits, fused, {"batch_stats": batch_stats}


def student_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the student's part of the variables of a `StudentWithFusion`."""
    return _select(variables, "student")


def _select(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the variables of one part, "student" or "fusion"."""
    return {collection: tree[name] for collection, tree in variables.items()}


def with_fusion(
    student: models.Model, teacher: models.Model, image_shape: tuple[int, ...]
) -> StudentWithFusion:
    """Returns a student with the fusion that fits the teacher's features.

    Args:
      student: a model of `models.create`.
      teacher: a model of `models.create`.
      image_shape: `(H, W, channels)`, or `(D,)` of features.

    Raises:
      ValueError: one of them has no features, or the two have different numbers of
        stages, so that the features cannot be compared one by one.

    >>> student = models.create("resnet8", 10)
    >>> teacher = models.create("resnet14", 10)
    >>> with_fusion(student, teacher, (8, 8, 1)).fusion.targets
    ((8, 16), (4, 32), (2, 64), (1, 64))
    """
    student_shapes = _feature_shapes(student, image_shape)
    teacher_shapes = _feature_shapes(teacher, image_shape)
    if len(student_shapes) != len(teacher_shapes):
        # One of the shapes is that of the pooled vector.
        raise ValueError(
            "reviewkd compares stage with stage: the student has "
            f"{len(student_shapes) - 1}, the teacher {len(teacher_shapes) - 1}: choose "
            "another pair"
        )
    fusion = Fusion(
        targets=teacher_shapes,
        # A custom model need not have these.
        dtype=getattr(student, "dtype", None),
        precision=getattr(student, "precision", None),
        axis_name=getattr(student, "axis_name", None),
    )
    return StudentWithFusion(student, fusion)


def _feature_shapes(
    model: models.Model, image_shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Returns (size, channels) of each feature, without computing any."""

    def compute_features(images: jax.Array) -> tuple[jax.Array, ...]:
        variables = model.init(jax.random.key(0), images, train=False)
        _, features, _ = models.apply_with_features(
            model, variables, images, train=False
        )
        if "pooled" not in features:
            raise ValueError(
                f"reviewkd compares features, and {type(model).__name__} has none: "
                "choose another model, or sow them, see models.apply_with_features"
            )
        return feature_maps(features)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    maps = jax.eval_shape(compute_features, images)
    return tuple((x.shape[1], x.shape[-1]) for x in maps)
