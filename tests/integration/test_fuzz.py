"""Anything goes in: what comes out is right, or an error that says what was wrong; and nothing is left behind."""

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
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import archives as made
from helpers import pictures, truth
from helpers.small_runs import config_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import common
from experiments.config import checks
from ltkd_jax import losses, methods, models
from ltkd_jax.data import datasets, longtail, records
from ltkd_jax.data.prepare import archives, download, folders, recipes
from ltkd_jax.groups import ClassGroups, shots

SEEDS = st.integers(0, 2**32 - 1)


def times(few, many):
    """A few cases that are always the same, and in the slow suite many that are not."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(number, check, **strategies):
    kind = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings(max_examples=number, derandomize=number < 100, **kind)(given(**strategies)(check))()


# Losses.

FORMS = [(shape, dtype) for shape in ((6, 10), (2, 3), (3, 100)) for dtype in (jnp.float32, jnp.bfloat16)]


@functools.cache
def every_loss():
    """All losses at once, with gradients by student and teacher: one compilation for each form of the logits."""

    def context(x):
        features = [jnp.clip(z, -1e15, 1e15)[..., None, None] for z in (x.student, x.teacher)]  # it squares them
        return losses.hierarchical_context(features[:1], features[1:])

    calls = {name: functools.partial(loss.call, losses) for name, loss in truth.FAMILY.items()} | {"context": context}

    def of(call, x):
        def total(student, teacher):
            loss = call(x._replace(student=student, teacher=teacher))
            return loss.sum(), loss

        return jax.grad(total, argnums=(0, 1), has_aux=True)(x.student, x.teacher)

    return jax.jit(lambda x: {name: of(call, x) for name, call in calls.items()})


def any_logits(rng, shape):
    """Of some kind, or of a kind for each row."""

    def of(kind):
        scale = 10 ** rng.uniform(-3, 4)
        if kind == "spikes":
            height = rng.choice([-1, 1], shape) * 10 ** rng.uniform(0, 30, shape)
            return np.where(rng.random(shape) < 1.5 / shape[1], height, rng.normal(0, 1, shape))
        return {
            "normal": rng.normal(0, scale, shape),
            "constant": np.full(shape, rng.normal(0, scale)),
            "ties": scale * rng.integers(-1, 2, shape),
        }[kind]

    kinds = ("normal", "constant", "ties", "spikes")
    first, second = of(rng.choice(kinds)), of(rng.choice(kinds))
    return np.where(rng.random((shape[0], 1)) < rng.choice([0, 0.5]), first, second)


def any_inputs(seed, temperature, shape, dtype):
    """Labels are of classes that exist; a group, and for all but the label every class, may not."""
    rng = np.random.default_rng(seed)
    B, C = shape
    labels = rng.integers(0, C, B, dtype=np.int32)
    groups = rng.permutation(np.concatenate([np.arange(3), rng.integers(0, 3, C - 3)]))
    where = rng.random(shape) < rng.choice([0.0, 0.5, 1.0])
    student, teacher = (jnp.asarray(any_logits(rng, shape), dtype) for _ in range(2))
    return truth.Inputs(
        student=student,
        teacher=student if rng.random() < 0.1 else teacher,
        labels=labels,
        where=where | (np.arange(C) == labels[:, None]),
        example_mask=rng.random(B) < rng.choice([0.0, 0.5, 1.0]),
        counts=rng.integers(1, 10**6, C).astype(np.int32),
        weights=(10 ** rng.uniform(-4, 4, C)).astype(np.float32),
        groups=ClassGroups.from_assignment(groups),
        temperature=np.float32(temperature),
    )


@times(20, 4000)
def test_losses_are_finite_not_negative_and_leave_the_teacher_alone(number):
    def check(seed, temperature, form):
        x = any_inputs(seed, temperature, *form)
        for name, ((by_student, by_teacher), loss) in jax.device_get(every_loss()(x)).items():
            known = truth.FAMILY.get(name)
            squared = temperature**2 if known and known.squared else 1.0
            assert np.isfinite(loss).all() and loss.dtype == np.float32, name
            assert (loss >= -1e-5 * squared * (known.terms if known else 1)).all(), (name, loss)
            assert np.isfinite(by_student.astype(np.float32)).all(), name
            assert not by_teacher.any(), name

    forms = FORMS if number > 100 else FORMS[1:2]  # a compilation takes seconds
    fuzz(number, check, seed=SEEDS, temperature=st.floats(0.1, 100), form=st.sampled_from(forms))


# Groups.

NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from([0, 10**18, 10**400, 2**63, 0.33, 0.34, 1 / 3, 0.5, None, True, "", "5", "x", 1j, b"1", [1], {}]),
)
GARBAGE = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=6), st.lists(NUMBERS, max_size=6).map(tuple), st.text())
COUNTS = st.one_of(st.lists(st.integers(1, 500), min_size=1, max_size=12), GARBAGE)
PARTS = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(lambda parts: [p / sum(parts) for p in parts])
NAMES = st.one_of(st.none(), st.lists(st.text(max_size=2), max_size=5).map(tuple), GARBAGE)


def refuses(call, *about):
    """What it gives; or None, where it raises an error that says what it is about."""
    try:
        return call()
    except ValueError as error:
        assert any(word in str(error) for word in about), error


@times(20, 3000)
def test_groups_are_a_partition_or_an_error(number):
    def partition(groups, length):
        if groups is not None:
            assert groups.assignment.shape == (length,) and groups.assignment.dtype == np.int32
            assert set(groups.assignment.tolist()) == set(range(groups.num_groups))
            assert len({*groups.names}) == groups.num_groups and all(isinstance(n, str) for n in groups.names)

    def check(counts, fractions, names, assignment, few, many):
        about = ("class_counts", "fractions", "names", "group")
        found = refuses(lambda: ClassGroups.from_counts(counts, fractions=fractions, names=names), *about)
        partition(found, found and len(counts))
        found = refuses(lambda: ClassGroups.from_assignment(assignment, names=names), "assignment", *about)
        partition(found, found and len(assignment))
        if found:
            np.testing.assert_array_equal(found.assignment, assignment)
        masks = refuses(lambda: shots(counts, many=many, few=few), "class_counts", "few=")
        if masks:
            assert (sum(mask.astype(int) for mask in masks.values()) == np.ones(len(counts))).all()

    assignment = st.one_of(st.lists(st.integers(0, 3), min_size=1, max_size=9), GARBAGE)
    fractions, limits = st.one_of(PARTS, GARBAGE), st.one_of(st.integers(-1, 300), st.floats())
    strategies = dict(counts=COUNTS, fractions=fractions, names=NAMES, assignment=assignment, few=limits, many=limits)
    fuzz(number, check, **strategies)


# The draw.


@times(20, 3000)
def test_a_draw_is_disjoint_balanced_and_as_counted_or_an_error(number):
    about = ("labels", "keys", "imbalance", "n_max", "num_classes", "meta_per_class", "validation_per_class")

    def held_out(drawn, labels, num_classes, meta, validation):
        together = np.concatenate(drawn)
        assert len(set(together.tolist())) == len(together) and set(together.tolist()) <= set(range(len(labels)))
        for part, per_class in ((drawn.meta, meta), (drawn.validation, validation)):
            assert (np.bincount(labels[part], minlength=num_classes) == per_class).all() and (np.diff(part) > 0).all()

    def check(sizes, stray, keys_of, num_classes, imbalance, n_max, meta, validation, seed, naming):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.concatenate([np.repeat(np.arange(len(sizes)), sizes), stray])).astype(int)
        keys = np.array([keys_of(i) for i in range(len(labels))], str)
        num_classes = len(sizes) if num_classes is None else num_classes
        wanted = refuses(lambda: longtail.counts(n_max, imbalance, num_classes), *about) if imbalance else None
        if wanted is not None:
            assert wanted.shape == (num_classes,) and wanted[0] == n_max and wanted[-1] >= 1
            assert (np.diff(wanted) <= 0).all()

        held = dict(num_classes=num_classes, meta_per_class=meta, validation_per_class=validation, seed=seed)
        drawn = refuses(lambda: longtail.split(labels, keys, imbalance=imbalance, n_max=n_max, **held), *about)
        if drawn is not None:
            held_out(drawn, labels, num_classes, meta, validation)
            most = n_max or np.bincount(labels).min() - meta - validation
            if imbalance is not None:
                expected = longtail.counts(most, imbalance, num_classes)
                np.testing.assert_array_equal(np.bincount(labels[drawn.train], minlength=num_classes), expected)
            else:
                assert sum(map(len, drawn)) == len(labels)
        one = refuses(lambda: longtail.balanced(labels, keys, num_classes=num_classes, per_class=meta), *about)
        assert one is None or (np.bincount(labels[one], minlength=num_classes) == meta).all()

        take, oddity = naming
        chosen = [i for i in range(len(labels)) if rng.random() < take]
        paths, of = [f"train/{keys[i]}" for i in chosen], [int(labels[i]) for i in chosen]
        odd = {"twice": (paths * 2, of * 2), "gone": ([*paths, "x"], [*of, 0]), "label": (paths, of[::-1])}
        paths, of = odd.get(oddity, (paths, of))
        listed = longtail.Listed((*paths,), (*of,), "list.txt")
        drawn = refuses(lambda: longtail.split_listed(listed, labels, keys, **held), "list.txt", *about)
        if drawn is not None:
            held_out(drawn, labels, num_classes, meta, validation)
            assert drawn.train.tolist() == sorted(chosen)

    fuzz(
        number,
        check,
        sizes=st.lists(st.integers(0, 9) | st.integers(4, 12), max_size=5),
        stray=st.lists(st.integers(-2, 7), max_size=1),
        keys_of=st.sampled_from([str, str, str, "image_{}".format, lambda i: "é" * i, lambda i: i // 2, lambda i: ""]),
        num_classes=st.none() | st.none() | st.integers(-1, 6),
        imbalance=st.none() | st.floats(1, 9) | st.floats() | st.sampled_from([1, 2, 0, -3, 10**400]),
        n_max=st.just(0) | st.integers(-1, 12) | st.sampled_from([10**6, 2**31, 2**63, 10**400]),
        meta=st.integers(-1, 3),
        validation=st.integers(-1, 3),
        seed=SEEDS,
        naming=st.tuples(st.floats(0, 1), st.sampled_from([None, None, "twice", "gone", "label"])),
    )


# The config's argument.

WORDS = (*methods.METHODS, "bikd", "smoke", "", " ", "kdd", "ltkd ltkd")
TEXTS = st.one_of(
    st.sampled_from(
        ["1", "0", "-1", "0.5", "2.0", "1e999", "nan", "9" * 400, "-" + "9" * 400, "9" * 5000, "0x" + "f" * 5000]
        + ["(" * 300 + ")" * 300, "[" * 99 + "]" * 99, "-" * 9000 + "1", "1+" * 900 + "1", "(" * 50 + "1," + ")" * 50]
        + ["(0.5, 0.5)", "(1j,)", "((1,), 2)", "(None,)", "(b'1', 0.5)", "(0.3, 'x')", "(nan, 1)", "()", "(1", "1)"]
        + ["True", "true", "None", "{}", "{[]: 1}", "[1]", "b'1'", "'a'", "...", "1_000", "\0", "a\0b", "\ud800", "é²"]
        + ["all", "exponential", "autoaugment", "kd", "ltkd", "bikd", "base", "soft", "resnet8", "vgg8", "wrn_16_1"]
    ),
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)


def paths_of(tree, prefix=""):
    """Of a config's values."""
    for key, value in tree.items():
        yield from paths_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


EVERY = sorted({path for method in ("ltkd", "bikd") for path in paths_of(config_of("digitslt", method).to_dict())})
NAMED = st.sampled_from([*sorted(models.REGISTRY), "all", "never", "gpu", "pmap", "tf32", "hard", "ltkd"]) | st.text()
VALUES = {
    bool: st.booleans(),
    int: st.integers(0, 40) | st.integers(),
    float: st.floats(0, 1) | st.floats(),
    str: NAMED,
    tuple: st.lists(st.floats(0, 1) | st.integers(1, 9) | NAMED, max_size=4).map(tuple),
}
KEYS = st.sampled_from([*common.SHORT, *EVERY])
PAIR = st.one_of(
    st.tuples(KEYS | st.sampled_from(["terms", "recipe", "alpha", "data", ""]), TEXTS).map("=".join),
    st.tuples(KEYS, st.integers(1, 20).map(str)).map("=".join),
)
ANYTHING = st.lists(PAIR | st.sampled_from(WORDS) | st.text(max_size=8), max_size=5)
ARGUMENTS = ANYTHING.map(",".join) | st.tuples(
    st.sampled_from([*WORDS, "kd,name=birds", "bikd,terms=ltkd,name=birds"]), st.lists(PAIR, max_size=3).map(",".join)
).map(",".join)
MUTATED = st.tuples(ARGUMENTS, st.integers(0, 40), st.sampled_from([*",=().\n \0\ud800", ""])).map(
    lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + 1 :]
)


@times(20, 4000)
def test_an_argument_is_refused_or_makes_a_config_with_a_lasting_hash(number, tmp_path):
    """Whatever is put in place of its values afterwards, too."""

    def resolve(name, argument, paths, values):
        config = config_of(name, argument)
        for path in set(paths) & set(paths_of(config.to_dict())):
            config.update_from_flattened_dict({path: values[type(checks._at(config, path))]})
        config.data.dir, config.teacher.checkpoint = str(tmp_path), ""
        checks.validate(config)
        return checks.identity(config), checks.config_hash(config)

    def check(name, argument, paths, values):
        try:
            first = resolve(name, argument, paths, values)
        except ValueError as error:
            assert str(error)
            return
        again = resolve(name, argument, paths, values)
        assert again[1] == first[1] and checks.identity_hash(first[0]) == first[1] and len(first[1]) == 12
        assert not any(tmp_path.iterdir())

    fuzz(
        number,
        check,
        name=st.sampled_from(["digitslt", "cifar100lt", "folderlt"]),
        argument=ARGUMENTS | MUTATED,
        paths=st.lists(st.sampled_from(EVERY), max_size=2),
        values=st.fixed_dictionaries(VALUES),
    )


# Preparation.


class Member:
    """What an archive or a folder holds: a file, or by `kind` something else; it may declare another size."""

    def __init__(self, name, data):
        self.name, self.data, self.kind, self.size = name, data, "file", None


TAR_TYPES = {
    "file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE, "sparse": tarfile.GNUTYPE_SPARSE, "long name": tarfile.GNUTYPE_LONGNAME,
    "attributes": tarfile.XHDTYPE, "all's attributes": tarfile.XGLTYPE,
}  # fmt: skip


def write_tar(path, members, rng):
    blocks = b""
    for member in members:
        info = tarfile.TarInfo(member.name)
        info.type, info.size = TAR_TYPES.get(member.kind, tarfile.REGTYPE), len(member.data)
        if "link" in member.kind:
            info.linkname, info.size = os.fsdecode(member.data[:90]), 0
        info.size = info.size if member.size is None else member.size
        blocks += info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")
        blocks += member.data + bytes(-len(member.data) % 512) if info.isreg() or info.size else b""
    blocks += bytes(1024)
    path.write_bytes(gzip.compress(damaged(blocks, rng) if rng.random() < 0.2 else blocks, 1))


def write_zip(path, members, rng):
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            info = zipfile.ZipInfo("x")
            info.filename = member.name.encode(errors="replace").decode()  # as it is, NUL and all
            info.external_attr = (stat.S_IFLNK if member.kind == "link" else stat.S_IFREG) << 16
            packed = {"sparse": zipfile.ZIP_BZIP2, "pipe": zipfile.ZIP_LZMA, "folder": zipfile.ZIP_STORED}
            archive.writestr(info, member.data, packed.get(member.kind, zipfile.ZIP_DEFLATED))
            if member.size is not None:
                info.file_size = member.size  # in the directory at the end, which is what is believed


def write_folder(path, members, rng):
    path.mkdir()
    for member in members:
        place = path / os.path.normpath(f"/{member.name}".replace("\0", "")).lstrip("/")
        with contextlib.suppress(OSError, ValueError):  # two things of one name, a name too long or with a NUL
            place.parent.mkdir(parents=True, exist_ok=True)
            if member.kind == "link":
                place.symlink_to(os.fsdecode(member.data))
            elif member.kind == "hard link":
                place.hardlink_to(path / os.fsdecode(member.data))
            elif member.kind == "pipe":
                os.mkfifo(place)
            elif member.kind == "folder":
                place.mkdir()
            else:
                with open(place, "xb") as file:  # never through a link
                    file.write(member.data)
                    if member.kind == "file" and member.size and member.size < 2**33:
                        file.truncate(member.size)  # it takes no room on disk


def png(width, height, data=b""):
    """A small file that declares so many pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def damaged(data, rng):
    """Some bytes changed, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 3, 20]) if data else 0):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data)


ODD_NAMES = (
    "../../x.jpg", "a\\b.jpg", "C:/x.jpg", "C:\\x.jpg", "x\0.jpg", "\0", "", "/", "//x/y.jpg", "\udcff.jpg", ".", "..",
    "x" * 300,
)  # fmt: skip
ODD_CONTENTS = (b"", b"GIF89a", b"a\tb\n", b"0 0\n", png(60_000, 60_000), png(3000, 3000), png(2, 2, bytes(14)))
ODD_TARGETS = (b"/dev/zero", b"..", b".", b"../outside.txt", b"gone")


def mutate(members, rng, sandbox):
    """One thing made other than it should be; nothing that is named lies outside the sandbox, or can be harmed."""
    member, other = rng.choice(members), rng.choice(members)
    what = rng.choice(["name", "name", "content", "content", "link", "kind", "twice", "gone", "size"])
    if what == "name":
        folder, odd = member.name.rpartition("/")[0], rng.choice(["\udcff", "..", " ", "\n", "é", "a\0b"])
        near = [f"../{member.name}", f"./{member.name}", f"/{member.name}", f"{member.name}/x.jpg", f"{member.name} "]
        names = [*ODD_NAMES, *near, f"{sandbox}/x.jpg", member.name.upper(), other.name, *[f"{folder}/{odd}.png"] * 5]
        member.name = rng.choice(names)
    elif what == "content":
        evil = pickle.dumps(made.Evil(str(sandbox / "mark")))
        contents = [*ODD_CONTENTS, *[damaged(member.data, rng)] * 5, other.data, evil, gzip.compress(evil)]
        member.data = rng.choice(contents)
    elif what == "link":
        member.kind = rng.choice(["link", "hard link"])
        member.data = rng.choice([*ODD_TARGETS, os.fsencode(other.name), os.fsencode(sandbox / "source" / other.name)])
    elif what == "kind":
        member.kind = rng.choice([*TAR_TYPES])
    elif what == "size":
        member.size = rng.choice([0, 1, 100, 2**29, 2**31, 2**33, len(member.data) + 9, len(member.data) // 2])
    elif what == "twice":
        members.insert(rng.randrange(len(members) + 1), Member(member.name, rng.choice([member.data, b"other"])))
    elif len(members) > 1:
        members.remove(member)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """(recipe, files by name, how they are written) of every kind of source; small, and as they should be."""
    place, small = tmp_path_factory.mktemp("originals"), dict(size=(6, 5))
    found = []
    for name, layout in made.LAYOUTS.items():
        archive, layout = made.pickle_archive(place / name, layout, made.fabricate(layout))
        files = made.members_of(archive)
        found.append((made.cifar_recipe(name, layout), files, write_tar))
    contents = made.idx_files()
    digests = {name: made.sha256(data) for name, data in contents.items()}
    read = functools.partial(archives.read_idx, sha256=digests)
    files = {name: gzip.compress(data) for name, data in contents.items()}
    found += [(recipes.Recipe("fashion_mnist", (), read), files, write) for write in (write_tar, write_folder)]
    files = pictures.tiny_imagenet(per_class=2, test_images=3)
    found += [(pictures.tiny_recipe(2, 3, 3), files, write) for write in (write_zip, write_folder)]
    files = pictures.by_class({"ant": 3, "bee": 3}, **small)
    files |= pictures.by_class({"ant": 1, "bee": 1}, kind="png", folder="ant/", **small)
    found += [(recipes.own_recipe("pets", test_per_class=1), files, write) for write in (write_zip, write_folder)]
    files = {f"train/{name}": data for name, data in files.items()} | {
        f"test/{name}": data for name, data in pictures.by_class({"ant": 1, "bee": 1}, kind="png", **small).items()
    }
    found += [(recipes.own_recipe("split"), files, write) for write in (write_zip, write_folder)]
    wnids = ("n01", "n02")
    files = {f"train/{name}": data for name, data in pictures.by_class(dict.fromkeys(wnids, 2), **small).items()}
    files |= {f"val/v{i}.JPEG": pictures.picture(0, i, **small) for i in range(2)}
    read = functools.partial(folders.imagenet, class_names=wnids, validation_labels=["n02", "n01"])
    return [*found, (recipes.Recipe("imagenet2012", (), read), files, write_folder)]


def listing(folder, but):
    """Everything below a folder, but for another: what it is, and when it was changed."""
    found = {}
    for path in folder.rglob("*"):
        if but not in (path, *path.parents):
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


TOLD = (archives.ArchiveError, recipes.PrepareError, download.DownloadError, records.DatasetNotPrepared, OSError)


@times(20, 3000)
@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore::UserWarning")
def test_a_source_is_prepared_whole_or_refused_and_nothing_else_happens(number, originals, tmp_path, monkeypatch):
    """No file beside the data directory, nothing half-written in it, and no pickle but those that are expected."""

    class Noted(archives._Unpickler):
        def __init__(self, file, **options):
            unpickled.append(made.md5(file.getvalue()))
            super().__init__(file, **options)

    def forbidden(*_, **__):
        raise AssertionError("a pickle was loaded")

    def check(index, edits, outside, seed):
        rng, sandbox = random.Random(seed), pathlib.Path(tempfile.mkdtemp(dir=tmp_path), "some", "where")
        for folder in ("work", "data"):
            (sandbox / folder).mkdir(parents=True)
        how, files, write = originals[index]
        members = [Member(name, data) for name, data in files.items()]
        for _ in range(edits):
            mutate(members, rng, sandbox)
        source, data_dir = sandbox / "source", sandbox / "data"
        (sandbox / "outside.txt").write_text("precious")
        write(source, members, rng)
        if outside and source.is_file():
            source.write_bytes(damaged(source.read_bytes(), rng))
        monkeypatch.chdir(sandbox / "work")
        unpickled.clear()
        before = listing(tmp_path, but=data_dir)
        try:
            written = recipes.prepare(how, data_dir, source, skip_damaged=rng.random() < 0.5)
        except TOLD as error:
            assert str(error)
            assert not any(data_dir.iterdir())
        else:
            assert written.relative_to(data_dir).parts[0] == how.name and os.listdir(data_dir) == [how.name]
            assert not [path for path in data_dir.rglob("*") if "unfinished" in path.name or "tmp" in path.name]
            size = 0 if how.name in ("cifar10", "cifar100", "fashion_mnist") else 8
            found = datasets.load(how.name, data_dir, size=size)
            for part in (found.train, found.test):
                assert len(part.take(np.arange(len(part))).images) == len(part) > 0
            prepared.add(index)
        assert listing(tmp_path, but=data_dir) == before
        expected = how.read.keywords["layout"].pickle_md5.values() if "layout" in how.read.keywords else ()
        assert set(unpickled) <= set(expected)
        shutil.rmtree(sandbox.parent.parent)

    unpickled, prepared = [], set()
    monkeypatch.setattr(archives, "_Unpickler", Noted)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    index = st.integers(0, len(originals) - 1)
    fuzz(number, check, index=index, edits=st.integers(0, 3), outside=st.booleans(), seed=SEEDS)
    assert number < 100 or prepared == set(range(len(originals)))


# Bombs.

MUCH = 300 << 20  # bytes


def tar_bomb(path, kind):
    """A small file of a header of some type, and very many zeros; or of the zeros alone."""
    info = tarfile.TarInfo("cifar-100-python/train")
    info.type, info.size = TAR_TYPES.get(kind), MUCH
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf() if info.type else b"")
        for _ in range(MUCH >> 20):
            file.write(bytes(1 << 20))


def zip_bomb(path, kind):
    """A small file with a member that is or claims to be large."""
    packed = zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", packed, compresslevel=1) as archive:
        archive.writestr("x.jpg", bytes(1000 if kind == "claims much" else MUCH // 4))
        archive.getinfo("x.jpg").file_size = MUCH if kind == "claims much" else 1000


@pytest.mark.parametrize("kind", ["file", "long name", "zeros", "claims much", "claims little", "bzip2"])
def test_a_bomb_is_refused_with_little_memory_and_time(kind, tmp_path):
    path, layout = tmp_path / "bomb", made.LAYOUTS["cifar100"]
    is_tar = kind in (*TAR_TYPES, "zeros")
    (tar_bomb if is_tar else zip_bomb)(path, kind)
    assert path.stat().st_size < 4 << 20
    tracemalloc.start()
    tracemalloc.reset_peak()
    start = time.process_time()
    with pytest.raises(archives.ArchiveError, match="bomb"):
        archives.read_cifar(path, layout) if is_tar else folders.Tree(path).read("x.jpg")
    assert time.process_time() - start < 10 and tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_a_sparse_file_with_a_damaged_map_is_refused(tmp_path):
    """Its parser raises a ValueError of its own."""
    attributes = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    member, head = Member("cifar-100-python/train", b"no map" * 99), Member("x", attributes)
    head.kind = "attributes"
    write_tar(tmp_path / "a", [head, member], random.Random(1))
    with pytest.raises(archives.ArchiveError, match="is truncated or can't be read"):
        archives.read_cifar(tmp_path / "a", made.LAYOUTS["cifar100"])
