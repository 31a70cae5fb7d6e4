"""Archives as the official ones are laid out, with random images."""

import dataclasses
import functools
import hashlib
import io
import os
import pickle
import struct
import tarfile

import numpy as np

from ltkd_jax.data.prepare import archives, recipes

TRAIN, TEST = 20, 10  # images of a fabricated archive


class Python2Pickler(pickle._Pickler):
    """Writes every string as the 8-bit string of Python 2, which wrote the official files."""

    def save_string(self, value):
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def fabricate(layout, seed=0):
    """Random images and labels of a CIFAR layout: by split, planes `[N, 3072]` and labels by name."""
    rng = np.random.default_rng(seed)
    return {
        split: (
            rng.integers(0, 256, (size, 3072), dtype=np.uint8),
            {name: rng.integers(0, classes, size) for name, classes in layout.num_classes.items()},
        )
        for split, size in (("train", TRAIN), ("test", TEST))
    }


def class_names(layout, name):
    return [f"{name}_{i}" for i in range(layout.num_classes[name])]


def chunks(data, members):
    """The part of a split that each of its members holds."""
    planes, labels = data
    for member, rows in zip(members, np.array_split(np.arange(len(planes)), len(members))):
        yield member, planes[rows], {name: values[rows] for name, values in labels.items()}


def dump_as_python_2(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def pickle_archive(path, layout, data):
    """An archive of pickles, and the layout with its checksums."""
    members = {
        layout.pickle_meta: {
            key: [n.encode() for n in class_names(layout, name)] for name, key in layout.pickle_names.items()
        }
    }
    for split, files in layout.pickle_splits.items():
        for member, planes, labels in chunks(data[split], files):
            named = {key: labels[name].tolist() for name, key in layout.pickle_labels.items()}
            members[member] = {b"data": planes, b"filenames": [b"x.png"] * len(planes)} | named
    members = {name: dump_as_python_2(value) for name, value in members.items()}
    return write_tar(path, members), dataclasses.replace(
        layout, pickle_md5={name: md5(value) for name, value in members.items()}
    )


def binary_archive(path, layout, data):
    """An archive of binary records, and the layout with its checksum."""
    members = {file: "\n".join(class_names(layout, n)).encode() + b"\n\n" for n, file in layout.binary_names.items()}
    for split, files in layout.binary_splits.items():
        for member, planes, labels in chunks(data[split], files):
            leading = np.stack([labels[name] for name in layout.label_bytes], axis=1).astype(np.uint8)
            members[member] = np.concatenate([leading, planes], axis=1).tobytes()
    write_tar(path, members)
    return path, dataclasses.replace(layout, binary_sha256=sha256(path.read_bytes()))


def idx(array):
    """An array in the idx format, gzipped."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def idx_files():
    rng = np.random.default_rng(0)
    contents = {}
    for prefix, size in (("train", TRAIN), ("t10k", TEST)):
        contents[f"{prefix}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (size, 28, 28)))
        contents[f"{prefix}-labels-idx1-ubyte.gz"] = idx(np.arange(size) % 10)
    return contents


def cifar_recipe(name, layout):
    return recipes.Recipe(name, (), functools.partial(archives.read_cifar, layout=layout))


LAYOUTS = {"cifar100": archives.cifar100("none"), "cifar10": archives.cifar10("none")}


ARCHIVES = {"pickles": pickle_archive, "binary": binary_archive}


def members_of(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


ARCHIVES = {"pickles": pickle_archive, "binary": binary_archive}
