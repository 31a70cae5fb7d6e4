"""Small image archives in the layouts of the official ones."""

import functools
import io
import zipfile

import numpy as np
from PIL import Image

from ltkd_jax.data.prepare import folders, recipes

# Not sorted, like the official ones.
TINY_CLASSES = ("n02000000", "n01000000", "n03000000")


def picture(label, number, *, size=(64, 64), mode="RGB", kind="jpeg"):
    """Returns an image file, different for each class and number."""
    rng = np.random.default_rng((label, number))
    pixels = rng.integers(0, 64, (size[1], size[0], 3)) + 12 * label
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, format=kind)
    return file.getvalue()


def tiny_imagenet(train_per_class=12, num_test=6, classes=TINY_CLASSES):
    """Returns the files of a small tiny-imagenet-200.zip by name."""
    root = "tiny-imagenet-200"
    class_names = sorted(classes)
    files = {f"{root}/wnids.txt": "\n".join(classes).encode()}
    for label, name in enumerate(class_names):
        folder = f"{root}/train/{name}"
        for i in range(train_per_class):
            mode = "L" if i == 1 else "RGB"  # the official one has grey images, too
            files[f"{folder}/images/{name}_{i}.JPEG"] = picture(label, i, mode=mode)
        files[f"{folder}/{name}_boxes.txt"] = b"0\t0\t0\t63\t63\n"
    lines = []
    for i in range(num_test):
        label = i % len(class_names)
        files[f"{root}/val/images/val_{i}.JPEG"] = picture(label, 1000 + i)
        lines.append(f"val_{i}.JPEG\t{class_names[label]}\t0\t0\t63\t63")
    files[f"{root}/val/val_annotations.txt"] = "\n".join(lines).encode()
    return files


def tiny_recipe(train_per_class=12, num_test=6, num_classes=3):
    """Returns the recipe of the archive that `tiny_imagenet` makes."""
    read = functools.partial(
        folders.tiny_imagenet,
        num_classes=num_classes,
        train_per_class=train_per_class,
        num_test=num_test,
    )
    return recipes.Recipe("tiny_imagenet", (), read)


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
    """Returns image files by the path `folder/CLASS/…`; `counts` is by class."""
    files = {}
    for label, name in enumerate(sorted(counts)):
        for i in range(counts[name]):
            file = picture(label, i, size=size, **options)
            files[f"{folder}{name}/{name}{i}.jpg"] = file
    return files
