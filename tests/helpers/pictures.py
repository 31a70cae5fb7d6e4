"""Fabricated image archives in the true layouts, small and quickly made."""

import functools
import io
import zipfile

import numpy as np
from PIL import Image

from ltkd_jax.data.prepare import folders, recipes

TINY_CLASSES = (
    "n02000000",
    "n01000000",
    "n03000000",
)  # in the official file they are not sorted either


def picture(label, number, *, size=(64, 64), mode="RGB", kind="jpeg"):
    """A file of an image that its class and its number can be seen in."""
    rng = np.random.default_rng((label, number))
    pixels = rng.integers(0, 64, (size[1], size[0], 3)) + 12 * label
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, format=kind)
    return file.getvalue()


def tiny_imagenet(per_class=12, test_images=6, classes=TINY_CLASSES, **changed):
    """The files of tiny-imagenet-200.zip by name; a keyword gives others by name."""
    root, files = "tiny-imagenet-200", {}
    files[f"{root}/wnids.txt"] = "\n".join(classes).encode()
    for label, name in enumerate(sorted(classes)):
        for i in range(per_class):
            mode = "L" if i == 1 else "RGB"  # the true one has grey images too
            files[f"{root}/train/{name}/images/{name}_{i}.JPEG"] = picture(
                label, i, mode=mode
            )
        files[f"{root}/train/{name}/{name}_boxes.txt"] = b"0\t0\t0\t63\t63\n"
    lines = []
    for i in range(test_images):
        label = i % len(classes)
        files[f"{root}/val/images/val_{i}.JPEG"] = picture(label, 1000 + i)
        lines.append(f"val_{i}.JPEG\t{sorted(classes)[label]}\t0\t0\t63\t63")
    files[f"{root}/val/val_annotations.txt"] = "\n".join(lines).encode()
    return files | changed


def tiny_recipe(per_class=12, test_images=6, classes=3):
    """The recipe of a fabricated one."""
    counts = dict(num_classes=classes, train_per_class=per_class, num_test=test_images)
    return recipes.Recipe(
        "tiny_imagenet", (), functools.partial(folders.tiny_imagenet, **counts)
    )


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def by_class(counts, *, folder="", size=(40, 30), **options):
    """Files of `folder/CLASS/…`, so many of each class."""
    return {
        f"{folder}{name}/{name}{i}.jpg": picture(label, i, size=size, **options)
        for label, (name, count) in enumerate(sorted(counts.items()))
        for i in range(count)
    }
