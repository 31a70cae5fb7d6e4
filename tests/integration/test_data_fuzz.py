"""Tests random draws, and random damage to sources of preparation.

The result is correct, or an error names the problem and nothing is left behind.
LTKD_FUZZ_EXAMPLES=3000 tries more examples than the usual ones.
"""

import contextlib
import functools
import gzip
import os
import pathlib
import pickle
import random
import shutil
import stat
import struct
import tempfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from helpers import pictures
from helpers.archives import fashion_mnist
from helpers.content import Malicious
from helpers.fuzzing import EXAMPLES, SEEDS, fuzz
from hypothesis import strategies as st

from ltkd_jax.data import datasets, longtail
from ltkd_jax.data.prepare import archives, folders, recipes

# The draw.

ARGUMENTS = (
    "labels",
    "keys",
    "imbalance",
    "n_max",
    "num_classes",
    "outer_per_class",
    "validation_per_class",
    "list.txt",
)


def try_call(call, *args, **kwargs):
    """Returns the result, or None after an error, which must name an argument."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        assert any(name in str(error) for name in ARGUMENTS), error
        return None


def count(labels, num_classes):
    return np.bincount(labels, minlength=num_classes)


def check_split(split, labels, num_classes, outer_per_class, validation_per_class):
    """Checks that a split is disjoint, with balanced and sorted held-out sets."""
    indices = np.concatenate(split).tolist()
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(len(labels)))
    assert (count(labels[split.outer], num_classes) == outer_per_class).all()
    assert (count(labels[split.validation], num_classes) == validation_per_class).all()
    assert (np.diff(split.outer) > 0).all()
    assert (np.diff(split.validation) > 0).all()


def check_counts(n_max, imbalance, num_classes):
    counts = try_call(longtail.counts, n_max, imbalance, num_classes)
    if counts is not None:
        assert counts.shape == (num_classes,)
        assert counts[0] == n_max and counts[-1] >= 1
        assert (np.diff(counts) <= 0).all()


def check_draw(labels, keys, imbalance, n_max, options):
    """Checks the held-out sets and the class counts of `longtail.split`."""
    split = try_call(
        longtail.split, labels, keys, imbalance=imbalance, n_max=n_max, **options
    )
    if split is None:
        return
    num_classes = options["num_classes"]
    outer_per_class = options["outer_per_class"]
    validation_per_class = options["validation_per_class"]
    check_split(split, labels, num_classes, outer_per_class, validation_per_class)
    if imbalance is None:
        assert sum(map(len, split)) == len(labels)
        return
    available = np.bincount(labels).min() - outer_per_class - validation_per_class
    expected = longtail.counts(n_max or available, imbalance, num_classes)
    train_counts = count(labels[split.train], num_classes)
    np.testing.assert_array_equal(train_counts, expected)


def check_list(labels, keys, train_indices, damage, options):
    """Checks `longtail.split_by_list` with a list that may be damaged."""
    paths = [f"train/{key}" for key in keys[train_indices]]
    path_labels = labels[train_indices].tolist()
    if damage == "twice":
        paths *= 2
        path_labels *= 2
    elif damage == "gone":
        paths.append("x")
        path_labels.append(0)
    elif damage == "label":
        path_labels.reverse()
    image_list = longtail.ImageList(tuple(paths), tuple(path_labels), "list.txt")
    split = try_call(longtail.split_by_list, image_list, labels, keys, **options)
    if split is not None:
        check_split(
            split,
            labels,
            options["num_classes"],
            options["outer_per_class"],
            options["validation_per_class"],
        )
        np.testing.assert_array_equal(split.train, train_indices)


def test_longtail():
    """A draw is disjoint, balanced and as counted, or it raises an error."""

    def check(
        sizes,
        stray_labels,
        key_of,
        num_classes,
        imbalance,
        n_max,
        outer,
        validation,
        seed,
        list_fraction,
        damage,
    ):
        rng = np.random.default_rng(seed)
        labels = [*np.repeat(np.arange(len(sizes)), sizes), *stray_labels]
        labels = rng.permutation(np.array(labels, int))
        keys = np.array([key_of(i) for i in range(len(labels))], str)
        if num_classes is None:
            num_classes = len(sizes)
        options = dict(
            num_classes=num_classes,
            outer_per_class=outer,
            validation_per_class=validation,
            seed=seed,
        )
        if imbalance:
            check_counts(n_max, imbalance, num_classes)
        check_draw(labels, keys, imbalance, n_max, options)
        subset = try_call(
            longtail.balanced_subset,
            labels,
            keys,
            num_classes=num_classes,
            per_class=outer,
        )
        if subset is not None:
            assert (count(labels[subset], num_classes) == outer).all()
        train_indices = np.flatnonzero(rng.random(len(labels)) < list_fraction)
        check_list(labels, keys, train_indices, damage, options)

    fuzz(
        check,
        sizes=st.lists(st.integers(0, 9) | st.integers(4, 12), max_size=5),
        stray_labels=st.lists(st.integers(-2, 7), max_size=1),
        key_of=st.sampled_from(
            [
                str,
                str,
                str,
                "image_{}".format,
                lambda i: "é" * i,
                lambda i: i // 2,
                lambda i: "",
            ]
        ),
        num_classes=st.none() | st.none() | st.integers(-1, 6),
        imbalance=st.none()
        | st.floats(1, 9)
        | st.floats()
        | st.sampled_from([1, 2, 0, -3, 10**400]),
        n_max=st.just(0)
        | st.integers(-1, 12)
        | st.sampled_from([10**6, 2**31, 2**63, 10**400]),
        outer=st.integers(-1, 3),
        validation=st.integers(-1, 3),
        seed=SEEDS,
        list_fraction=st.floats(0, 1),
        damage=st.sampled_from([None, None, "twice", "gone", "label"]),
    )


# Preparation.

KINDS = ("file", "link", "hard link", "pipe", "folder", "bzip2", "lzma")


class Member:
    """Describes an entry of an archive or a folder.

    It is a file, or by `kind` something else, and `size` is the size that it declares,
    or None for the true one.
    """

    def __init__(self, name, data):
        self.name = name
        self.data = data
        self.kind = "file"
        self.size = None


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            info = zipfile.ZipInfo("x")
            # Set afterwards, since the constructor would cut a name off at its NUL.
            info.filename = member.name.encode(errors="replace").decode()
            file_type = stat.S_IFLNK if member.kind == "link" else stat.S_IFREG
            info.external_attr = file_type << 16
            compressions = {
                "bzip2": zipfile.ZIP_BZIP2,
                "lzma": zipfile.ZIP_LZMA,
                "folder": zipfile.ZIP_STORED,
            }
            compression = compressions.get(member.kind, zipfile.ZIP_DEFLATED)
            archive.writestr(info, member.data, compression)
            if member.size is not None:
                # Of the directory at the end of the archive, which readers believe.
                info.file_size = member.size


def write_folder(root, members):
    root.mkdir()
    for member in members:
        # Without "..", so that nothing is written outside of the folder.
        relative = os.path.normpath(f"/{member.name}".replace("\0", "")).lstrip("/")
        # Two members of one name, or a name that is too long, are left out.
        with contextlib.suppress(OSError, ValueError):
            (root / relative).parent.mkdir(parents=True, exist_ok=True)
            write_member(root / relative, member, root)


def write_member(path, member, root):
    if member.kind == "link":
        path.symlink_to(os.fsdecode(member.data))
    elif member.kind == "hard link":
        path.hardlink_to(root / os.fsdecode(member.data))
    elif member.kind == "pipe":
        os.mkfifo(path)
    elif member.kind == "folder":
        path.mkdir()
    else:
        # "x": never through a link.
        with open(path, "xb") as file:
            file.write(member.data)
            if member.size and member.size < 2**33:
                file.truncate(member.size)  # sparse, so it takes no space on disk


def png(width, height, data=b""):
    """Returns a small PNG file that declares any number of pixels."""

    def png_chunk(kind, content):
        length = struct.pack(">I", len(content))
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return length + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(data)),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def damage(data, rng):
    """Returns the data with some bytes changed, or without its end."""
    data = bytearray(data)
    num_changes = rng.choice([0, 1, 1, 3, 20]) if data else 0
    for _ in range(num_changes):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


ODD_NAMES = (
    "../../x.jpg",
    "a\\b.jpg",
    "C:/x.jpg",
    "C:\\x.jpg",
    "x\0.jpg",
    "\0",
    "",
    "/",
    "//x/y.jpg",
    "\udcff.jpg",
    ".",
    "..",
    "x" * 300,
)
ODD_CONTENTS = (
    b"",
    b"GIF89a",
    b"a\tb\n",
    b"0 0\n",
    png(60_000, 60_000),
    png(3000, 3000),
    png(2, 2, bytes(14)),
)
ODD_TARGETS = (b"/dev/zero", b"..", b".", b"../outside.txt", b"gone")


def odd_name(member, other, rng, sandbox):
    folder = member.name.rpartition("/")[0]
    odd = rng.choice(["\udcff", "..", " ", "\n", "é", "a\0b"])
    names = [
        *ODD_NAMES,
        f"../{member.name}",
        f"./{member.name}",
        f"/{member.name}",
        f"{member.name}/x.jpg",
        f"{member.name} ",
        f"{sandbox}/x.jpg",
        member.name.upper(),
        other.name,
        *[f"{folder}/{odd}.png"] * 5,
    ]
    return rng.choice(names)


def odd_content(member, other, rng, sandbox):
    malicious = pickle.dumps(Malicious(str(sandbox / "mark")))
    damaged = [damage(member.data, rng)] * 5
    return rng.choice([*ODD_CONTENTS, *damaged, other.data, malicious])


def odd_size(member, rng):
    size = len(member.data)
    return rng.choice([0, 1, 100, 2**29, 2**31, 2**33, size + 9, size // 2])


def mutate(members, rng, sandbox):
    """Changes one member. No name or link leads to a file that could be harmed."""
    member = rng.choice(members)
    other = rng.choice(members)
    change = rng.choice(
        ["name", "name", "content", "content", "link", "kind", "twice", "gone", "size"]
    )
    if change == "name":
        member.name = odd_name(member, other, rng, sandbox)
    elif change == "content":
        member.data = odd_content(member, other, rng, sandbox)
    elif change == "link":
        member.kind = rng.choice(["link", "hard link"])
        source = os.fsencode(sandbox / "source" / other.name)
        member.data = rng.choice([*ODD_TARGETS, os.fsencode(other.name), source])
    elif change == "kind":
        member.kind = rng.choice(KINDS)
    elif change == "size":
        member.size = odd_size(member, rng)
    elif change == "twice":
        position = rng.randrange(len(members) + 1)
        data = rng.choice([member.data, b"other"])
        members.insert(position, Member(member.name, data))
    elif len(members) > 1:
        members.remove(member)


def prepare_cases():
    """Returns (recipe, files by name, writer of the source) of all kinds of sources."""
    small = dict(size=(6, 5))
    fashion_recipe, _, fashion_files = fashion_mnist()
    train = pictures.by_class({"ant": 3, "bee": 3}, **small)
    test = pictures.by_class({"ant": 1, "bee": 1}, kind="png", **small)
    unsplit = train | {f"ant/{name}": data for name, data in test.items()}
    split = {f"train/{name}": data for name, data in train.items()}
    split |= {f"test/{name}": data for name, data in test.items()}
    wnids = ("n01", "n02")
    imagenet = pictures.by_class(dict.fromkeys(wnids, 2), folder="train/", **small)
    for i in (1, 2):
        picture = pictures.picture(0, i, **small)
        imagenet[f"val/ILSVRC2012_val_{i:08d}.JPEG"] = picture
    read_imagenet = functools.partial(
        folders.imagenet, class_names=wnids, validation_labels=["n02", "n01"]
    )
    zips_and_folders = [
        (pictures.tiny_recipe(2, 3), pictures.tiny_imagenet(2, 3)),
        (recipes.custom_recipe("pets", test_per_class=1), unsplit),
        (recipes.custom_recipe("split"), split),
    ]
    folders_only = [
        (fashion_recipe, fashion_files),
        (recipes.Recipe("imagenet2012", (), read_imagenet), imagenet),
    ]
    cases = [(*case, write_zip) for case in zips_and_folders]
    cases += [(*case, write_folder) for case in [*zips_and_folders, *folders_only]]
    return cases


def list_states(folder, excluded):
    """Returns the mode, size and time of all below a folder except a subfolder."""
    states = {}
    for path in folder.rglob("*"):
        if excluded not in (path, *path.parents):
            status = path.lstat()
            states[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return states


def check_prepared(written, data_dir, recipe):
    """Checks that a data directory holds one data set, which can be read completely."""
    assert written.relative_to(data_dir).parts[0] == recipe.name
    assert os.listdir(data_dir) == [recipe.name]
    for path in data_dir.rglob("*"):
        assert "unfinished" not in path.name and "tmp" not in path.name
    size = 0 if recipe.name == "fashion_mnist" else 8
    source = datasets.load(recipe.name, data_dir, size=size)
    for split in (source.train, source.test):
        assert len(split.take(np.arange(len(split))).images) == len(split) > 0


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning")
def test_prepare(tmp_path, monkeypatch):
    """A source is prepared completely, or nothing is written outside or inside."""
    cases = prepare_cases()
    prepared = set()

    def check(index, edits, outside, seed):
        rng = random.Random(seed)
        sandbox = pathlib.Path(tempfile.mkdtemp(dir=tmp_path), "some", "where")
        source = sandbox / "source"
        data_dir = sandbox / "data"
        (sandbox / "work").mkdir(parents=True)
        data_dir.mkdir()
        recipe, files, write = cases[index]
        members = [Member(name, data) for name, data in files.items()]
        for _ in range(edits):
            mutate(members, rng, sandbox)
        (sandbox / "outside.txt").write_text("precious")
        write(source, members)
        if outside and source.is_file():
            source.write_bytes(damage(source.read_bytes(), rng))
        monkeypatch.chdir(sandbox / "work")
        states = list_states(tmp_path, excluded=data_dir)
        skip_damaged = rng.random() < 0.5
        try:
            written = recipes.prepare(
                recipe, data_dir, source, skip_damaged=skip_damaged
            )
        except (archives.ArchiveError, recipes.PrepareError, OSError) as error:
            assert str(error)
            assert not any(data_dir.iterdir())
        else:
            check_prepared(written, data_dir, recipe)
            prepared.add(index)
        assert list_states(tmp_path, excluded=data_dir) == states
        shutil.rmtree(sandbox.parent.parent)

    fuzz(
        check,
        index=st.integers(0, len(cases) - 1),
        edits=st.integers(0, 3),
        outside=st.booleans(),
        seed=SEEDS,
    )
    assert EXAMPLES < 100 or prepared == set(range(len(cases)))


# Bombs.

LARGE = 300 << 20  # bytes


@pytest.mark.parametrize(
    "kind, size, declared_size",
    [
        ("declares much", 1000, LARGE),
        ("declares little", LARGE // 4, 1000),
        ("bzip2", LARGE // 4, 1000),
    ],
)
def test_zip_bomb(kind, size, declared_size, tmp_path):
    path = tmp_path / "bomb.zip"
    compression = zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        archive.writestr("x.jpg", bytes(size))
        archive.getinfo("x.jpg").file_size = declared_size
    assert path.stat().st_size < 4 << 20
    tracemalloc.start()
    with pytest.raises(archives.ArchiveError, match="bomb"):
        folders.FileTree(path).read("x.jpg")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_gzip_bomb(tmp_path, monkeypatch):
    """Decompresses no more than the limit."""
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    recipe, _, files = fashion_mnist()
    for name in files:
        (tmp_path / name).write_bytes(gzip.compress(bytes(32 << 20), 1))
    tracemalloc.start()
    with pytest.raises(archives.ArchiveError, match="sha256"):
        recipe.read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
