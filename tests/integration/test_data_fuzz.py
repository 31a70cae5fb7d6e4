"""Random draws and random damage: the result is right, or an error says what was wrong; and nothing is left behind.

More examples than the usual ones, which are always the same: LTKD_FUZZ_EXAMPLES=3000.
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
from helpers.content import Evil
from helpers.fuzzing import EXAMPLES, SEEDS, fuzz
from hypothesis import strategies as st

from ltkd_jax.data import datasets, longtail
from ltkd_jax.data.prepare import archives, folders, recipes

# The draw.

ARGUMENTS = (
    "labels", "keys", "imbalance", "n_max", "num_classes", "outer_per_class", "validation_per_class", "list.txt",
)  # fmt: skip


def try_to(call, *args, **kwargs):
    """Returns what it returns; or None where it raises an error that names an argument."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        assert any(name in str(error) for name in ARGUMENTS), error


def check_split(split, labels, num_classes, outer, validation):
    indices = np.concatenate(split)
    assert len(set(indices.tolist())) == len(indices) and set(indices.tolist()) <= set(
        range(len(labels))
    )
    for part, per_class in ((split.outer, outer), (split.validation, validation)):
        assert (
            np.bincount(labels[part], minlength=num_classes) == per_class
        ).all() and (np.diff(part) > 0).all()


def test_longtail():
    """A draw is disjoint, balanced and as counted, or refused."""

    def check(
        sizes,
        stray,
        key_of,
        num_classes,
        imbalance,
        n_max,
        outer,
        validation,
        seed,
        share,
        oddity,
    ):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(
            np.concatenate([np.repeat(np.arange(len(sizes)), sizes), stray])
        ).astype(int)
        keys = np.array([key_of(i) for i in range(len(labels))], str)
        num_classes = len(sizes) if num_classes is None else num_classes
        if imbalance:
            counts = try_to(longtail.counts, n_max, imbalance, num_classes)
            if counts is not None:
                assert (
                    counts.shape == (num_classes,)
                    and counts[0] == n_max
                    and counts[-1] >= 1
                )
                assert (np.diff(counts) <= 0).all()

        options = dict(
            num_classes=num_classes,
            outer_per_class=outer,
            validation_per_class=validation,
            seed=seed,
        )
        split = try_to(
            longtail.split, labels, keys, imbalance=imbalance, n_max=n_max, **options
        )
        if split is not None:
            check_split(split, labels, num_classes, outer, validation)
            if imbalance is None:
                assert sum(map(len, split)) == len(labels)
            else:
                largest = n_max or np.bincount(labels).min() - outer - validation
                expected = longtail.counts(largest, imbalance, num_classes)
                np.testing.assert_array_equal(
                    np.bincount(labels[split.train], minlength=num_classes), expected
                )
        balanced = try_to(
            longtail.balanced_subset, labels, keys, num_classes=num_classes, per_class=outer
        )
        if balanced is not None:
            assert (np.bincount(labels[balanced], minlength=num_classes) == outer).all()

        chosen = np.flatnonzero(rng.random(len(labels)) < share)
        paths, path_labels = (
            [f"train/{key}" for key in keys[chosen]],
            labels[chosen].tolist(),
        )
        if oddity == "twice":
            paths, path_labels = paths * 2, path_labels * 2
        elif oddity == "gone":
            paths, path_labels = [*paths, "x"], [*path_labels, 0]
        elif oddity == "label":
            path_labels = path_labels[::-1]
        listed = longtail.ImageList(tuple(paths), tuple(path_labels), "list.txt")
        split = try_to(longtail.split_by_list, listed, labels, keys, **options)
        if split is not None:
            check_split(split, labels, num_classes, outer, validation)
            np.testing.assert_array_equal(split.train, chosen)

    fuzz(
        check,
        sizes=st.lists(st.integers(0, 9) | st.integers(4, 12), max_size=5),
        stray=st.lists(st.integers(-2, 7), max_size=1),
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
        share=st.floats(0, 1),
        oddity=st.sampled_from([None, None, "twice", "gone", "label"]),
    )


# Preparation.

KINDS = ("file", "link", "hard link", "pipe", "folder", "bzip2", "lzma")


class Member:
    """What an archive or a folder holds: a file, or by `kind` something else; it may declare another size."""

    def __init__(self, name, data):
        self.name, self.data = name, data
        self.kind, self.size = "file", None


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            info = zipfile.ZipInfo("x")
            info.filename = member.name.encode(
                errors="replace"
            ).decode()  # as it is, NUL and all
            info.external_attr = (
                stat.S_IFLNK if member.kind == "link" else stat.S_IFREG
            ) << 16
            compressions = {
                "bzip2": zipfile.ZIP_BZIP2,
                "lzma": zipfile.ZIP_LZMA,
                "folder": zipfile.ZIP_STORED,
            }
            archive.writestr(
                info, member.data, compressions.get(member.kind, zipfile.ZIP_DEFLATED)
            )
            if member.size is not None:
                info.file_size = (
                    member.size
                )  # in the directory at the end, which is what is believed


def write_folder(path, members):
    path.mkdir()
    for member in members:
        target = path / os.path.normpath(f"/{member.name}".replace("\0", "")).lstrip(
            "/"
        )
        with contextlib.suppress(
            OSError, ValueError
        ):  # two things of one name, a name too long or with a NUL
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.kind == "link":
                target.symlink_to(os.fsdecode(member.data))
            elif member.kind == "hard link":
                target.hardlink_to(path / os.fsdecode(member.data))
            elif member.kind == "pipe":
                os.mkfifo(target)
            elif member.kind == "folder":
                target.mkdir()
            else:
                with open(target, "xb") as file:  # never through a link
                    file.write(member.data)
                    if member.size and member.size < 2**33:
                        file.truncate(member.size)  # it takes no room on disk


def png(width, height, data=b""):
    """Returns a small file that declares so many pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def damaged(data, rng):
    """Changes some bytes, or cuts off the end."""
    data = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 3, 20]) if data else 0):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data)


ODD_NAMES = (
    "../../x.jpg", "a\\b.jpg", "C:/x.jpg", "C:\\x.jpg", "x\0.jpg", "\0", "", "/", "//x/y.jpg", "\udcff.jpg", ".", "..",
    "x" * 300,
)  # fmt: skip
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


def mutate(members, rng, sandbox):
    """Changes one thing; nothing that is named lies outside the sandbox, or can be harmed."""
    member, other = rng.choice(members), rng.choice(members)
    change = rng.choice(
        ["name", "name", "content", "content", "link", "kind", "twice", "gone", "size"]
    )
    if change == "name":
        folder, odd = (
            member.name.rpartition("/")[0],
            rng.choice(["\udcff", "..", " ", "\n", "é", "a\0b"]),
        )
        near = [
            f"../{member.name}",
            f"./{member.name}",
            f"/{member.name}",
            f"{member.name}/x.jpg",
            f"{member.name} ",
        ]
        names = [
            *ODD_NAMES,
            *near,
            f"{sandbox}/x.jpg",
            member.name.upper(),
            other.name,
            *[f"{folder}/{odd}.png"] * 5,
        ]
        member.name = rng.choice(names)
    elif change == "content":
        evil = pickle.dumps(Evil(str(sandbox / "mark")))
        member.data = rng.choice(
            [*ODD_CONTENTS, *[damaged(member.data, rng)] * 5, other.data, evil]
        )
    elif change == "link":
        member.kind = rng.choice(["link", "hard link"])
        member.data = rng.choice(
            [
                *ODD_TARGETS,
                os.fsencode(other.name),
                os.fsencode(sandbox / "source" / other.name),
            ]
        )
    elif change == "kind":
        member.kind = rng.choice(KINDS)
    elif change == "size":
        member.size = rng.choice(
            [
                0,
                1,
                100,
                2**29,
                2**31,
                2**33,
                len(member.data) + 9,
                len(member.data) // 2,
            ]
        )
    elif change == "twice":
        members.insert(
            rng.randrange(len(members) + 1),
            Member(member.name, rng.choice([member.data, b"other"])),
        )
    elif len(members) > 1:
        members.remove(member)


def originals():
    """Returns (recipe, files by name, how they are written) of every kind of folder and zip, small and undamaged."""
    small = dict(size=(6, 5))
    fashion, _, fashion_files = fashion_mnist()
    own = pictures.by_class({"ant": 3, "bee": 3}, **small)
    test = pictures.by_class({"ant": 1, "bee": 1}, kind="png", **small)
    split = {f"train/{name}": data for name, data in own.items()}
    split |= {f"test/{name}": data for name, data in test.items()}
    wnids = ("n01", "n02")
    imagenet = pictures.by_class(dict.fromkeys(wnids, 2), folder="train/", **small)
    imagenet |= {f"val/v{i}.JPEG": pictures.picture(0, i, **small) for i in range(2)}
    read = functools.partial(
        folders.imagenet, class_names=wnids, validation_labels=["n02", "n01"]
    )
    zips = [
        (
            pictures.tiny_recipe(2, 3, 3),
            pictures.tiny_imagenet(per_class=2, test_images=3),
        ),
        (
            recipes.custom_recipe("pets", test_per_class=1),
            own | {f"ant/{name}": data for name, data in test.items()},
        ),
        (recipes.custom_recipe("split"), split),
    ]
    only_folders = [
        (fashion, fashion_files),
        (recipes.Recipe("imagenet2012", (), read), imagenet),
    ]
    return [(*case, write_zip) for case in zips] + [
        (*case, write_folder) for case in [*zips, *only_folders]
    ]


def listing(folder, but):
    """Returns everything below a folder, but for another: what it is, and when it was changed."""
    entries = {}
    for path in folder.rglob("*"):
        if but not in (path, *path.parents):
            status = path.lstat()
            entries[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return entries


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning")
def test_prepare(tmp_path, monkeypatch):
    """A source is prepared whole or refused: no file beside the data directory, nothing half-written in it."""
    cases = originals()
    prepared = set()

    def check(index, edits, outside, seed):
        rng, sandbox = (
            random.Random(seed),
            pathlib.Path(tempfile.mkdtemp(dir=tmp_path), "some", "where"),
        )
        for folder in ("work", "data"):
            (sandbox / folder).mkdir(parents=True)
        recipe, files, write = cases[index]
        members = [Member(name, data) for name, data in files.items()]
        for _ in range(edits):
            mutate(members, rng, sandbox)
        source, data_dir = sandbox / "source", sandbox / "data"
        (sandbox / "outside.txt").write_text("precious")
        write(source, members)
        if outside and source.is_file():
            source.write_bytes(damaged(source.read_bytes(), rng))
        monkeypatch.chdir(sandbox / "work")
        before = listing(tmp_path, but=data_dir)
        try:
            written = recipes.prepare(
                recipe, data_dir, source, skip_damaged=rng.random() < 0.5
            )
        except (archives.ArchiveError, recipes.PrepareError, OSError) as error:
            assert str(error)
            assert not any(data_dir.iterdir())
        else:
            assert written.relative_to(data_dir).parts[0] == recipe.name and os.listdir(
                data_dir
            ) == [recipe.name]
            assert not [
                path
                for path in data_dir.rglob("*")
                if "unfinished" in path.name or "tmp" in path.name
            ]
            loaded = datasets.load(
                recipe.name, data_dir, size=0 if recipe.name == "fashion_mnist" else 8
            )
            for part in (loaded.train, loaded.test):
                assert len(part.take(np.arange(len(part))).images) == len(part) > 0
            prepared.add(index)
        assert listing(tmp_path, but=data_dir) == before
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


@pytest.mark.parametrize("kind", ["claims much", "claims little", "bzip2"])
def test_zip_bomb(kind, tmp_path):
    path = tmp_path / "bomb.zip"
    compression = zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        archive.writestr("x.jpg", bytes(1000 if kind == "claims much" else LARGE // 4))
        archive.getinfo("x.jpg").file_size = LARGE if kind == "claims much" else 1000
    assert path.stat().st_size < 4 << 20
    tracemalloc.start()
    with pytest.raises(archives.ArchiveError, match="bomb"):
        folders.FileTree(path).read("x.jpg")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_gzip_bomb(tmp_path, monkeypatch):
    """No more is decompressed than an official file may have."""
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    recipe, _, files = fashion_mnist()
    for name in files:
        (tmp_path / name).write_bytes(gzip.compress(bytes(32 << 20), 1))
    tracemalloc.start()
    with pytest.raises(archives.ArchiveError, match="sha256"):
        recipe.read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
