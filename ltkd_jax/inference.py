"""A trained classifier by itself: saved, loaded, applied, and exported.

It needs neither the data set nor the run that it comes from. Two files hold it:
`model.msgpack`, its variables as Flax serializes them, and `model.json`, what else is
needed to classify an image.

    from ltkd_jax import inference

    classifier = inference.load("runs/digits-10-ltkd-resnet20-resnet8-s0")
    logits, labels = classifier(["a.png", "b.png"])
    names = [classifier.class_names[label] for label in labels]

One that was trained on features takes an array of them, as they are in the file.
"""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from ltkd_jax import files, models
from ltkd_jax.data import augment, features, resize
from ltkd_jax.models import convert

PyTree = Any
Images = np.ndarray | Sequence[str | os.PathLike[str]]

FILE_NAME = "model.json"
WEIGHTS_NAME = "model.msgpack"
_FORMAT = 1
# Images that are classified at once.
_MAX_BATCH = 64
_PLATFORMS = ("cpu", "cuda", "tpu")


class ModelError(ValueError):
    """Raised for a model that cannot be loaded; the message names file and remedy."""


class Classification(NamedTuple):
    """Holds the result for N images.

    Attributes:
      logits: float32 `[N, C]`.
      labels: int64 `[N]`, the most probable class of each image.
    """

    logits: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Holds a trained network, and how an image, or features, become its input.

    Attributes:
      model: its name, a key of `models.REGISTRY`.
      variables: what `model.apply` takes.
      class_names: one for each of the C classes.
      image_shape: `(H, W, channels)` of its input, or `(D,)` of features.
      mean: of each channel on the [0, 1] scale, or of each column.
      std: likewise.
      margin: whether a resized image loses a margin, see `resize.center_crop`.
      precision: see `models.create`.
    """

    model: str
    variables: PyTree
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    margin: bool = False
    precision: str = "float32"

    def __call__(self, images: Images) -> Classification:
        """Classifies any number of images or features.

        Args:
          images: uint8 `[N, H, W, channels]`, or paths of image files, which are
            converted and resized as `read_images` does it; for a network of features,
            numbers `[N, D]` that are not normalised.

        Raises:
          ValueError: images or features of another type or shape, a file that is no
            image, or a feature that is not finite.
        """
        inputs = self._check(images)
        logits = np.zeros((len(inputs), len(self.class_names)), np.float32)
        for start in range(0, len(inputs), _MAX_BATCH):
            part = inputs[start : start + _MAX_BATCH]
            # Filled up to a power of two, so that few sizes are compiled.
            size = 1 << (len(part) - 1).bit_length()
            batch = np.zeros((size, *self.image_shape), self._dtype)
            batch[: len(part)] = part
            batch_logits = self._jitted(self.variables, batch)
            logits[start : start + len(part)] = batch_logits[: len(part)]
        return Classification(logits, logits.argmax(axis=-1))

    @property
    def takes_features(self) -> bool:
        """Returns whether its input is features, not images."""
        return len(self.image_shape) == 1

    @property
    def _dtype(self) -> type[np.generic]:
        return np.float32 if self.takes_features else np.uint8

    def _check(self, images: Images) -> np.ndarray:
        """Returns the network's input: images, or features as float32."""
        if self.takes_features:
            return features.to_float32(
                np.asarray(images), "features", *self.image_shape
            )
        if isinstance(images, (str, os.PathLike)):
            raise ValueError(f"give a list of paths, such as [{os.fspath(images)!r}]")
        pixels = images if isinstance(images, np.ndarray) else self.read_images(images)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.image_shape:
            raise ValueError(
                f"images are {pixels.dtype} of shape {list(pixels.shape)}: give uint8 "
                f"[N, {', '.join(map(str, self.image_shape))}], or paths of image files"
            )
        return pixels

    def read_images(self, paths: Sequence[str | os.PathLike[str]]) -> np.ndarray:
        """Returns the images in files as uint8 `[N, H, W, channels]`.

        An image of another size is cropped to its central square and resized, as the
        test images were.

        Raises:
          ValueError: a file cannot be read as an image.
        """
        from PIL import Image

        height, width, channels = self.image_shape
        pixels = np.zeros((len(paths), *self.image_shape), np.uint8)
        for i, path in enumerate(paths):
            try:
                # Pillow may decode only when the pixels are used: keep the file open.
                with Image.open(path) as file:
                    image = resize.convert_mode(resize.make_upright(file), channels)
                    if image.size != (width, height):
                        crop = resize.center_crop(image, height, margin=self.margin)
                    else:
                        crop = np.asarray(image).reshape(self.image_shape)
            except (
                OSError,
                ValueError,
                AttributeError,  # neither a path nor a file
                Image.DecompressionBombError,
            ) as error:
                raise ValueError(f"cannot read {path} as an image: {error}") from error
            pixels[i] = crop
        return pixels

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.msgpack` and `model.json` into a folder.

        The first is also a file for `teacher.checkpoint`.
        """
        path = pathlib.Path(folder) / FILE_NAME
        weights = path.with_suffix(".msgpack")
        with files.atomic_write(weights) as temporary:
            variables = jax.tree.map(np.asarray, self.variables)
            temporary.write_bytes(serialization.msgpack_serialize(variables))
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "variables"
        }
        # Last, since it says which variables belong to it.
        checksum = files.sha256(weights)
        files.write_json(path, {"format": _FORMAT, "sha256": checksum, **fields})

    def export(self, platforms: Sequence[str] = _PLATFORMS) -> bytes:
        """Returns the classifier as StableHLO, for `jax.export.deserialize`.

        It maps uint8 `[N, H, W, channels]`, or float32 features `[N, D]`, for any N, to
        float32 logits `[N, C]`. The variables and the normalisation are part of it, and
        it runs where this library is not installed:

            exported = jax.export.deserialize(bytearray(path.read_bytes()))
            logits = exported.call(images)

        Args:
          platforms: on which it is to run.

        Raises:
          ModelError: the model needs the number of images when it is traced.
          ImportError: jax needs the package flatbuffers for it; the extra `train` has
            it.
        """
        (batch_size,) = jax.export.symbolic_shape("b")
        shape = (batch_size, *self.image_shape)
        # The variables become constants.
        logits_fn = jax.jit(functools.partial(self._logits, self.variables))
        try:
            exported = jax.export.export(logits_fn, platforms=platforms)(
                jax.ShapeDtypeStruct(shape, self._dtype)
            )
        except TypeError as error:
            raise ModelError(
                f"{self.model} cannot be exported for any batch size: {error}; the "
                "model has to write images.shape[0], not len(images)"
            ) from error
        return bytes(exported.serialize())

    @functools.cached_property
    def _jitted(self) -> Callable[[PyTree, np.ndarray], jax.Array]:
        return jax.jit(self._logits)

    def _logits(self, variables: PyTree, images: jax.Array) -> jax.Array:
        model: models.Model = models.create(
            self.model, len(self.class_names), precision=self.precision
        )
        normalized = augment.normalize(images, self.mean, self.std)
        return model.apply(variables, normalized, train=False)


def load(path: str | os.PathLike[str]) -> Classifier:
    """Loads a classifier.

    Args:
      path: the folder of a run or of a teacher, or the `model.json` in it.

    Raises:
      ModelError: there is none, it is damaged, or of another version.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise ModelError(
            f"there is no {path}: give the folder of a finished run, or its {FILE_NAME}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format")
        checksum = fields.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} is damaged, or describes no model: {error}") from None
    if version != _FORMAT:
        raise ModelError(
            f"{path} is of format {version!r}, and this version of ltkd_jax reads "
            f"format {_FORMAT}: use the version that wrote it"
        )
    name = fields.get("model")
    if name not in models.REGISTRY:
        raise ModelError(
            f"{path} is of an unknown model {name!r}: import the module that registers "
            "it first (--import=MODULE)"
        )
    weights = path.with_suffix(".msgpack")
    if not weights.is_file() or files.sha256(weights) != checksum:
        raise ModelError(
            f"{weights} is missing or damaged: its checksum is not the one in {path}"
        )
    try:
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        variables = convert.load(
            weights,
            fields["model"],
            len(fields["class_names"]),
            image_shape=fields["image_shape"],
        )
        # On the device, so that they are not copied there for every batch.
        return Classifier(variables=jax.device_put(variables), **fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
