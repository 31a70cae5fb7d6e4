"""Archives laid out as the official ones are, with random images."""

import dataclasses
import functools
import gzip
import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np

from ltkd_jax.data.prepare import archives, recipes

TRAIN, TEST = 20, 10  # images of a fabricated archive
LAYOUTS = {"cifar100": archives.CIFAR100, "cifar10": archives.CIFAR10}
FOLDERS = {  # in the archive of pickles and in that of binary records
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
}
NUM_CLASSES = {"cifar100": {"coarse_label": 20, "label": 100}, "cifar10": {"label": 10}}


class Python2Pickler(pickle._Pickler):
    """Writes every string as the 8-bit string of Python 2, which wrote the official files."""

    def save_string(self, value):
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def dump_as_python_2(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_tar(path, members):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def fabricate(name):
    """Returns random images and labels: by split, planes `[N, 3072]` and labels by name."""
    rng = np.random.default_rng(0)
    data = {}
    for split, size in (("train", TRAIN), ("test", TEST)):
        labels = {
            label: rng.integers(0, classes, size)
            for label, classes in NUM_CLASSES[name].items()
        }
        data[split] = rng.integers(0, 256, (size, 3072), dtype=np.uint8), labels
    return data


def class_names(name, label):
    return [f"{label}_{i}" for i in range(NUM_CLASSES[name][label])]


def chunks(data, members):
    """Yields the part of a split that each of its members holds."""
    planes, labels = data
    for member, rows in zip(
        members, np.array_split(np.arange(len(planes)), len(members))
    ):
        yield (
            member,
            planes[rows],
            {name: values[rows] for name, values in labels.items()},
        )


def pickle_archive(path, name, data):
    """Writes an archive of pickles, and returns the layout with its checksum."""
    layout = LAYOUTS[name]
    meta = {
        f"{key}_names".encode(): class_names(name, label)
        for label, key in layout.pickle_names.items()
    }
    members = {f"{FOLDERS[name][0]}/{layout.pickle_meta}": dump_as_python_2(meta)}
    for split, files in layout.splits.items():
        for file, planes, labels in chunks(data[split], files):
            batch = {
                f"{key}s".encode(): labels[label].tolist()
                for label, key in layout.pickle_names.items()
            }
            members[f"{FOLDERS[name][0]}/{file}"] = dump_as_python_2(
                batch | {b"data": planes}
            )
    write_tar(path, members)
    return dataclasses.replace(layout, pickle_sha256=sha256(path.read_bytes()))


def binary_archive(path, name, data):
    """Writes an archive of binary records, and returns the layout with its checksum."""
    layout = LAYOUTS[name]
    members = {}
    for label, file in layout.binary_names.items():
        members[f"{FOLDERS[name][1]}/{file}"] = (
            "\n".join(class_names(name, label)).encode() + b"\n\n"
        )
    for split, files in layout.splits.items():
        for file, planes, labels in chunks(data[split], files):
            leading = np.stack(
                [labels[label] for label in layout.binary_names], axis=1
            ).astype(np.uint8)
            members[f"{FOLDERS[name][1]}/{file}.bin"] = np.concatenate(
                [leading, planes], axis=1
            ).tobytes()
    write_tar(path, members)
    return dataclasses.replace(layout, binary_sha256=sha256(path.read_bytes()))


ARCHIVES = {"pickles": pickle_archive, "binary": binary_archive}


def cifar_recipe(name, layout):
    return recipes.Recipe(
        name, (), functools.partial(archives.read_cifar, layout=layout)
    )


def idx(array):
    """Returns an array as an idx file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def fashion_mnist():
    """Returns the recipe of a small Fashion-MNIST, its images and labels by split, and its gzipped files by name."""
    rng = np.random.default_rng(0)
    data, contents = {}, {}
    for split, prefix, size in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        data[split] = rng.integers(0, 256, (size, 28, 28)), np.arange(size) % 10
        for kind, array in zip(("images-idx3", "labels-idx1"), data[split]):
            contents[f"{prefix}-{kind}-ubyte.gz"] = idx(array)
    read = functools.partial(
        archives.read_idx,
        sha256={name: sha256(content) for name, content in contents.items()},
    )
    files = {name: gzip.compress(content) for name, content in contents.items()}
    return recipes.Recipe("fashion_mnist", (), read), data, files
