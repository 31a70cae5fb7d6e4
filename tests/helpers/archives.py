"""Archives in the layouts of the official ones, with random images."""

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

NUM_TRAIN = 20
NUM_TEST = 10
LAYOUTS = {"cifar100": archives.CIFAR100, "cifar10": archives.CIFAR10}
PICKLE_FOLDERS = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}
BINARY_FOLDERS = {"cifar100": "cifar-100-binary", "cifar10": "cifar-10-batches-bin"}
NUM_CLASSES = {"cifar100": {"coarse_label": 20, "label": 100}, "cifar10": {"label": 10}}


class Python2Pickler(pickle._Pickler):
    """Writes strings as 8-bit ones, as Python 2 did in the official files."""

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
    """Returns by split random images `[N, 3072]`, and labels by name."""
    rng = np.random.default_rng(0)
    data = {}
    for split, size in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        labels = {}
        for label, num_classes in NUM_CLASSES[name].items():
            labels[label] = rng.integers(0, num_classes, size)
        data[split] = rng.integers(0, 256, (size, 3072), dtype=np.uint8), labels
    return data


def class_names(name, label):
    return [f"{label}_{i}" for i in range(NUM_CLASSES[name][label])]


def divide(data, file_names):
    """Yields the images and labels that each file of a split holds."""
    planes, labels = data
    divided_indices = np.array_split(np.arange(len(planes)), len(file_names))
    for file_name, indices in zip(file_names, divided_indices):
        file_labels = {name: values[indices] for name, values in labels.items()}
        yield file_name, planes[indices], file_labels


def pickle_archive(path, name, data):
    """Writes an archive of pickles, and returns the layout with its checksum."""
    layout = LAYOUTS[name]
    folder = PICKLE_FOLDERS[name]
    meta = {}
    for label, key in layout.pickle_names.items():
        meta[f"{key}_names".encode()] = class_names(name, label)
    members = {f"{folder}/{layout.pickle_meta}": dump_as_python_2(meta)}
    for split, file_names in layout.splits.items():
        for file_name, planes, labels in divide(data[split], file_names):
            batch = {}
            for label, key in layout.pickle_names.items():
                batch[f"{key}s".encode()] = labels[label].tolist()
            batch[b"data"] = planes
            members[f"{folder}/{file_name}"] = dump_as_python_2(batch)
    write_tar(path, members)
    return dataclasses.replace(layout, pickle_sha256=sha256(path.read_bytes()))


def binary_archive(path, name, data):
    """Writes an archive of binary records, and returns the layout with its checksum."""
    layout = LAYOUTS[name]
    folder = BINARY_FOLDERS[name]
    members = {}
    for label, file_name in layout.binary_names.items():
        lines = "\n".join(class_names(name, label)) + "\n\n"
        members[f"{folder}/{file_name}"] = lines.encode()
    for split, file_names in layout.splits.items():
        for file_name, planes, labels in divide(data[split], file_names):
            label_bytes = [labels[label] for label in layout.binary_names]
            label_bytes = np.stack(label_bytes, axis=1).astype(np.uint8)
            records = np.concatenate([label_bytes, planes], axis=1)
            members[f"{folder}/{file_name}.bin"] = records.tobytes()
    write_tar(path, members)
    return dataclasses.replace(layout, binary_sha256=sha256(path.read_bytes()))


ARCHIVES = {"pickles": pickle_archive, "binary": binary_archive}


def cifar_recipe(name, layout):
    read = functools.partial(archives.read_cifar, layout=layout)
    return recipes.Recipe(name, (), read)


def idx(array):
    """Returns an array as an idx file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def fashion_mnist():
    """Returns the recipe, the data by split and the files of a small Fashion-MNIST."""
    rng = np.random.default_rng(0)
    data = {}
    contents = {}
    for split, prefix, size in (
        ("train", "train", NUM_TRAIN),
        ("test", "t10k", NUM_TEST),
    ):
        images = rng.integers(0, 256, (size, 28, 28))
        labels = np.arange(size) % 10
        data[split] = images, labels
        contents[f"{prefix}-images-idx3-ubyte.gz"] = idx(images)
        contents[f"{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
    digests = {name: sha256(content) for name, content in contents.items()}
    read = functools.partial(archives.read_idx, sha256=digests)
    files = {name: gzip.compress(content) for name, content in contents.items()}
    return recipes.Recipe("fashion_mnist", (), read), data, files
