"""Image archives and folders of images by class: what is read, and what is refused."""

import io
import logging
import os
import zipfile

import numpy as np
import pytest
from helpers import pictures
from PIL import Image

from ltkd_jax.data import datasets, longtail, records, resize
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import archives, folders, recipes, tfds_writer

PETS = {"cat": 6, "dog": 5, "ant": 4}


def nothing_left(place):
    return not place.exists() or sorted(p.name for p in place.iterdir()) == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    archive = pictures.write_zip(place / "tiny-imagenet-200.zip", pictures.tiny_imagenet())
    recipes.prepare(pictures.tiny_recipe(), place / "tfds", archive)
    return place


def test_tiny_imagenet(tiny):
    source = datasets.load("tiny_imagenet", tiny / "tfds")
    assert source.class_names == tuple(sorted(pictures.TINY_CLASSES))
    assert np.bincount(source.train.labels).tolist() == [12] * 3
    assert np.bincount(source.test.labels).tolist() == [2] * 3
    train = source.train.take(np.arange(36))
    for image, label, key in zip(train.images, train.labels, train.keys):
        name, number = key.split("_")
        assert name == source.class_names[label]
        mode = "L" if number == "1" else "RGB"
        file = Image.open(io.BytesIO(pictures.picture(label, int(number), mode=mode)))
        np.testing.assert_array_equal(image, np.asarray(file.convert("RGB")))
    assert datasets.load("tiny_imagenet", tiny / "tfds", size=32).train.take([0]).images.shape == (1, 32, 32, 3)


def test_the_unpacked_folder_is_the_zip(tiny, tmp_path):
    unpacked = pictures.write_folder(tmp_path / "any", pictures.tiny_imagenet())
    for root in (unpacked, unpacked / "tiny-imagenet-200"):
        out = tmp_path / root.name
        recipes.prepare(pictures.tiny_recipe(), out / "tfds", root)
        ours, theirs = (datasets.load("tiny_imagenet", place / "tfds") for place in (out, tiny))
        for part in ("train", "test"):
            a, b = (getattr(source, part).take(np.arange(len(getattr(source, part)))) for source in (ours, theirs))
            for x, y in ((a.images, b.images), (a.labels, b.labels), (a.keys, b.keys)):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tiny-imagenet-200/train/n01000000/images/n01000000_7.JPEG": None}, "'n01000000' has 11 training images"),
        ({"tiny-imagenet-200/train/n01000000/images/n01000000_7.JPEG": b"no image"}, "n01000000_7.*not decode"),
        ({"tiny-imagenet-200/wnids.txt": b"n01000000 n02000000"}, "2 classes, expected 3"),
        ({"tiny-imagenet-200/wnids.txt": None}, "no file tiny-imagenet-200/wnids.txt"),
        (
            {"tiny-imagenet-200/val/images/val_3.JPEG": None},
            "names 'val_3.JPEG' of class 'n01000000', which is not there",
        ),
        ({"tiny-imagenet-200/val/val_annotations.txt": b"val_0.JPEG\tn09"}, "'val_0.JPEG' of class 'n09'"),
        ({"tiny-imagenet-200/val/val_annotations.txt": b""}, "names 0 images, expected 6"),
        (
            {"tiny-imagenet-200/val/images/val_0.JPEG": pictures.picture(0, 0, size=(32, 32))},
            "'val_0' of class 'n01000000': it is 32×32 pixels, expected 64×64",
        ),
    ],
)
def test_a_changed_tiny_imagenet_is_refused(tmp_path, change, message):
    files = {name: data for name, data in (pictures.tiny_imagenet() | change).items() if data is not None}
    archive = pictures.write_zip(tmp_path / "tiny.zip", files)
    with pytest.raises((archives.ArchiveError, recipes.PrepareError), match=message):
        recipes.prepare(pictures.tiny_recipe(), tmp_path / "tfds", archive)
    assert nothing_left(tmp_path / "tfds")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_truncated_zip_is_refused(tmp_path, cut):
    archive = pictures.write_zip(tmp_path / "tiny.zip", pictures.tiny_imagenet())
    data = archive.read_bytes()
    archive.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(archives.ArchiveError, match="tiny.zip is no folder, and no whole zip archive"):
        recipes.prepare(pictures.tiny_recipe(), tmp_path / "tfds", archive)
    assert nothing_left(tmp_path / "tfds")


def test_a_flipped_byte_in_a_zip_is_named(tmp_path):
    archive = pictures.write_zip(tmp_path / "tiny.zip", pictures.tiny_imagenet())
    data = bytearray(archive.read_bytes())
    place = data.index(b"n01000000_7.JPEG") + 200
    data[place] ^= 255
    archive.write_bytes(data)
    with pytest.raises(recipes.PrepareError, match="'n01000000_7' of class 'n01000000'.*CRC"):
        recipes.prepare(pictures.tiny_recipe(), tmp_path / "tfds", archive)
    assert nothing_left(tmp_path / "tfds")


def own(tmp_path, files, *arguments, name="pets"):
    """The exit code of preparing a folder of these files."""
    root = pictures.write_folder(tmp_path / "images", files)
    return command.main(["folder", f"--name={name}", f"--source={root}", f"--data_dir={tmp_path / 'tfds'}", *arguments])


def test_a_folder_of_ones_own(tmp_path, capsys):
    files = pictures.by_class(PETS) | {"cat/.hidden.jpg": b"", "cat/notes.txt": b"x", ".git/x.jpg": b""}
    files["cat/deep/er/grey.png"] = pictures.picture(1, 50, size=(20, 25), mode="L", kind="png")
    files["dog/old.bmp"] = pictures.picture(2, 51, kind="bmp")
    assert own(tmp_path, files, "--test_per_class=2") == 0
    assert "pets is prepared" in capsys.readouterr().out
    source = datasets.load("pets", tmp_path / "tfds", size=16)
    assert source.class_names == ("ant", "cat", "dog")
    assert np.bincount(source.train.labels).tolist() == [2, 5, 4]
    assert np.bincount(source.test.labels).tolist() == [2] * 3
    passed_over = {"cat/.hidden.jpg", "cat/notes.txt", ".git/x.jpg"}
    assert {*source.train.keys, *source.test.keys} == set(files) - passed_over
    assert source.train.shape == (16, 16, 3) and source.views.pad == 2
    for part in (source.train, source.test):
        images = part.take(np.arange(len(part)))
        for image, key in zip(images.images, images.keys):
            original = resize.in_mode(Image.open(io.BytesIO(files[key])), 3)
            np.testing.assert_array_equal(image, resize.center(original, 16, margin=False), err_msg=key)
    # Large images' labels and keys are kept beside them; a damaged copy is only a copy.
    kept = sorted((tmp_path / "tfds" / "pets").rglob("index-*.npz"))
    assert [path.name for path in kept] == ["index-test.npz", "index-train.npz"]
    for damage in (b"", b"PK damaged"):
        kept[1].write_bytes(damage)
        again = datasets.load("pets", tmp_path / "tfds", size=16)
        np.testing.assert_array_equal(again.train.keys, source.train.keys)
    assert own(tmp_path, files, "--test_per_class=2") == 0
    told = capsys.readouterr().out
    assert "already prepared" in told and "nothing was read" in told


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_with_a_split(tmp_path, test):
    files = pictures.by_class(PETS, folder="train/") | pictures.by_class({name: 1 for name in PETS}, folder=f"{test}/")
    archive = pictures.write_zip(tmp_path / "pets.zip", {f"pets/{name}": data for name, data in files.items()})
    recipes.prepare(recipes.own_recipe("pets"), tmp_path / "tfds", archive)
    source = datasets.load("pets", tmp_path / "tfds", size=32)
    assert np.bincount(source.train.labels).tolist() == [4, 6, 5] and len(source.test) == 3


@pytest.mark.parametrize(
    "files, arguments, message",
    [
        (pictures.by_class(PETS), [], "no folders train and test: give --test_per_class=N"),
        (pictures.by_class(PETS), ["--test_per_class=4"], "class 'ant' has 4 images.*hold out fewer"),
        (pictures.by_class(PETS) | {"bee/x.txt": b""}, ["--test_per_class=1"], "class folder 'bee' has no image"),
        (pictures.by_class({"cat": 3}), ["--test_per_class=1"], "0 class folders, and at least 2"),
        (
            pictures.by_class(PETS, folder="train/") | pictures.by_class({"cat": 1, "fly": 1}, folder="test/"),
            [],
            "class 'ant' is in one of train and test only .3 such",
        ),
        (pictures.by_class(PETS) | {"cat/cat9.jpg": b"\xff\xd8 no image"}, ["--test_per_class=1"], "'cat/cat9.jpg'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(tmp_path, capsys, files, arguments, message):
    assert own(tmp_path, files, *arguments) == 2
    error = capsys.readouterr().err
    error = error.splitlines()[-1]  # below TFDS's bars
    assert error.startswith("error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert nothing_left(tmp_path / "tfds")


def test_an_empty_class_folder_is_named(tmp_path, capsys):
    (tmp_path / "images" / "bee").mkdir(parents=True)
    assert own(tmp_path, pictures.by_class(PETS), "--test_per_class=1") == 2
    assert "class folder 'bee' has no image" in capsys.readouterr().err


def test_damaged_images_are_left_out_only_if_that_is_asked_for(tmp_path, caplog):
    files = pictures.by_class(PETS, folder="train/") | pictures.by_class(PETS, folder="test/")
    good = files["train/cat/cat3.jpg"]
    files["train/cat/cat3.jpg"] = good[: len(good) // 2]  # truncated
    files["test/dog/dog0.jpg"] = b""
    with caplog.at_level(logging.WARNING):
        assert own(tmp_path, files, "--skip_damaged") == 0
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "'cat/cat3.jpg' of class 'cat'" in told and "'dog/dog0.jpg'" in told and "1 of 15 train images" in told
    source = datasets.load("pets", tmp_path / "tfds", size=16)
    assert np.bincount(source.train.labels).tolist() == [4, 5, 5] and len(source.test) == 14


def test_a_class_whose_images_are_all_damaged_is_not_left_out(tmp_path, capsys):
    files = pictures.by_class(PETS) | {name: b"" for name in pictures.by_class(PETS) if name.startswith("ant")}
    assert own(tmp_path, files, "--test_per_class=1", "--skip_damaged") == 2
    assert "images of class 'ant': none of them decodes" in capsys.readouterr().err
    assert nothing_left(tmp_path / "tfds")


@pytest.mark.parametrize("name", ["Pets", "cifar10", "mnist", "digits", "../x", "folder", "1a"])
def test_bad_names(name):
    with pytest.raises(recipes.PrepareError, match="--name"):
        recipes.own_recipe(name)


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet2012"])
def test_what_cannot_be_fetched_says_where_it_is(tmp_path, name):
    with pytest.raises(recipes.PrepareError, match="can't be fetched: give --source, the .* from http"):
        recipes.prepare(recipes.recipe(name), tmp_path)


def test_links_out_of_an_archive_are_names_only(tmp_path):
    """A zip's absolute and climbing names are never opened as paths."""
    files = pictures.by_class(PETS) | {"/etc/x.jpg": b"", "../../out.jpg": b""}
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((archives.ArchiveError, recipes.PrepareError)):
        recipes.prepare(recipes.own_recipe("pets", test_per_class=1), tmp_path / "tfds", archive)
    assert sorted(set(os.listdir(tmp_path)) - {"tfds"}) == before


def imagenet_files(wnids, train=2):
    files = {}
    for label, name in enumerate(wnids):
        for i in range(train):
            files[f"train/{name}/{name}_{i}.JPEG"] = pictures.picture(label % 9, i, size=(12, 10))
    return files


def test_imagenet(tmp_path):
    """Both layouts of the validation images, with TFDS's own thousand classes."""
    stock = recipes.recipe("imagenet2012").read.keywords
    wnids, of_validation = stock["class_names"], stock["validation_labels"]
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids) and len(of_validation) == 50_000
    assert set(of_validation) == set(wnids)
    few = dict(class_names=wnids[:3], validation_labels=[wnids[1], wnids[0], wnids[2], wnids[1]])
    train = imagenet_files(wnids[:3])
    flat = {f"val/ILSVRC2012_val_{i:08d}.JPEG": pictures.picture(5, i) for i in range(1, 5)}
    by_class = {f"val/{few['validation_labels'][i - 1]}/ILSVRC2012_val_{i:08d}.JPEG": b"" for i in range(1, 5)}
    found = []
    for name, val in (("flat", flat), ("by_class", by_class)):
        files = folders.imagenet(pictures.write_folder(tmp_path / name, train | val), **few)
        found.append({entry.id: entry.label for entry in files.splits["validation"]})
        of_train = {f"{name}_{i}.JPEG": label for label, name in enumerate(wnids[:3]) for i in (0, 1)}
        assert {entry.id: entry.label for entry in files.splits["train"]} == of_train
    assert found[0] == found[1] == {f"ILSVRC2012_val_{i:08d}.JPEG": c for i, c in ((1, 1), (2, 0), (3, 2), (4, 1))}
    with pytest.raises(archives.ArchiveError, match=f"folder '{wnids[3]}' is missing .997 such"):
        folders.imagenet(tmp_path / "flat", class_names=wnids, validation_labels=of_validation)


# Lists.


def test_a_list_of_images(tmp_path):
    path = tmp_path / "ImageNet_LT_train.txt"
    path.write_text("train/n01/n01_b.JPEG 0\n\ntrain/n02/n02 c.JPEG 1\n")
    listed = longtail.read_list(path)
    keys, labels = np.array(["n01_a.JPEG", "n01_b.JPEG", "n02 c.JPEG", "n02_d.JPEG"]), np.array([0, 0, 1, 1])
    drawn = longtail.split_listed(listed, labels, keys, num_classes=2)
    assert drawn.train.tolist() == [1, 2] and not len(drawn.meta) and not len(drawn.validation)
    more = np.array([*keys, "e", "f"]), np.array([*labels, 0, 1])
    drawn = longtail.split_listed(listed, more[1], more[0], num_classes=2, meta_per_class=1)
    assert drawn.train.tolist() == [1, 2] and np.bincount(more[1][drawn.meta]).tolist() == [1, 1]
    assert not set(drawn.meta) & set(drawn.train)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.JPEG", "list.txt:1: 'a.JPEG' is not of the form"),
        ("a.JPEG 0\nb.JPEG one", "list.txt:2"),
        ("", "is empty"),
        (
            "a.JPEG 0\nx/gone.JPEG 1\nx/gone2.JPEG 1",
            "'x/gone.JPEG' and 1 more of its 3 images are not among the training images",
        ),
        ("a.JPEG 1", "'a.JPEG' has label 1, but 0 here"),
        ("a.JPEG 0\nx/a.JPEG 0", "'x/a.JPEG' is the image 'a.JPEG' again"),
    ],
)
def test_a_bad_list_is_told(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    labels, keys = np.array([0, 1]), np.array(["a.JPEG", "b.JPEG"])
    with pytest.raises(ValueError, match=message):
        longtail.find_listed(longtail.read_list(tmp_path / "list.txt"), labels, keys)


def test_a_set_as_it_is():
    labels = np.repeat([0, 1, 2], (9, 5, 3))
    keys = np.arange(17).astype(str)
    drawn = longtail.split(labels, keys, num_classes=3, imbalance=None, meta_per_class=1, validation_per_class=1)
    assert np.bincount(labels[drawn.train]).tolist() == [7, 3, 1]
    assert len({*drawn.train, *drawn.meta, *drawn.validation}) == 17
    with pytest.raises(ValueError, match="class 2 has only 3 images"):
        longtail.split(labels, keys, num_classes=3, imbalance=None, meta_per_class=3)


def test_images_of_differing_sizes_need_a_size(tmp_path):
    assert own(tmp_path, pictures.by_class(PETS), "--test_per_class=1") == 0
    with pytest.raises(ValueError, match="set data.image_size"):
        datasets.load("pets", tmp_path / "tfds")
    for name in ("*", "../tfds/pets", "p?ts", ""):
        assert records.find_builder(name, tmp_path / "tfds") is None
    builder = records.find_builder("pets", tmp_path / "tfds")
    assert records.read(builder, "train", 8, margin=True).fit == "margin"


# What people have on their disks.


def test_a_split_in_more_than_a_gigabytes_way_needs_no_tensorflow(tmp_path, monkeypatch):
    """TFDS's own writer would call TensorFlow beyond its buffer; ours has none, and starts a new file."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    monkeypatch.setattr(tfds_writer, "_SHARD", 2000)
    assert own(tmp_path, pictures.by_class(PETS), "--test_per_class=1") == 0
    files = sorted(path.name for path in (tmp_path / "tfds").rglob("pets-train.array_record*"))
    assert len(files) > 3 and files[0].endswith(f"-00000-of-{len(files):05d}")
    source = datasets.load("pets", tmp_path / "tfds", size=16)
    assert np.bincount(source.train.labels).tolist() == [3, 5, 4]
    for key, image in zip(source.train.keys, source.train.take(np.arange(12)).images):
        file = Image.open(io.BytesIO(pictures.by_class(PETS)[key]))
        np.testing.assert_array_equal(image, resize.center(file, 16, margin=False))
    # TFDS reads it too.
    import tensorflow_datasets as tfds

    stock = tfds.builder_from_directory(next((tmp_path / "tfds" / "pets").iterdir())).as_data_source("train")
    assert {example["id"].decode() for example in stock} == set(source.train.keys)


def test_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 65535, 16, dtype=np.uint16)[None], (16, 16))
    files = pictures.by_class(PETS, size=(16, 16))
    for kind in ("png", "tiff"):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(ramp)).save(file, format=kind)
        files[f"cat/deep.{kind}"] = file.getvalue()
    assert own(tmp_path, files, "--test_per_class=1") == 0
    source = datasets.load("pets", tmp_path / "tfds", size=16)
    for part in (source.train, source.test):
        for key, image in zip(part.keys, part.take(np.arange(len(part))).images):
            if "deep" in key:
                np.testing.assert_array_equal(image[..., 0], np.round(ramp / 257))


@pytest.mark.parametrize(
    "files, message",
    [
        (
            pictures.by_class(PETS, folder="train/") | pictures.by_class(PETS, folder="rest/"),
            "beside train one of test",
        ),
        ({f" {name}": data for name, data in pictures.by_class(PETS).items()}, "class folder ' ant'.*rename it"),
        ({f"a\nb{name}": data for name, data in pictures.by_class(PETS).items()}, "rename it"),
    ],
)
def test_folders_that_would_be_misread(tmp_path, capsys, files, message):
    assert own(tmp_path, files, "--test_per_class=1") == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


def test_other_spellings_of_a_split_links_and_what_macos_adds(tmp_path):
    files = pictures.by_class(PETS, folder="Train/") | pictures.by_class({n: 1 for n in PETS}, folder="Valid/")
    files |= {"__MACOSX/Train/cat/._cat0.jpg": b"x"}
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    recipes.prepare(recipes.own_recipe("zipped"), tmp_path / "tfds", archive)
    assert len(datasets.load("zipped", tmp_path / "tfds", size=8).test) == 3
    pictures.write_folder(tmp_path / "real", pictures.by_class(PETS))
    (tmp_path / "links").mkdir()
    for name in PETS:
        (tmp_path / "links" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "cat" / "loop").symlink_to(tmp_path / "real")
    recipes.prepare(recipes.own_recipe("linked", test_per_class=1), tmp_path / "tfds", tmp_path / "links")
    linked = datasets.load("linked", tmp_path / "tfds", size=8)
    assert linked.class_names == ("ant", "cat", "dog") and np.bincount(linked.train.labels)[0] == 3


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_image_that_is_there_twice(tmp_path, capsys):
    archive = tmp_path / "images"
    archive.mkdir()
    with zipfile.ZipFile(archive / "pets.zip", "w") as file:
        for name, data in [*pictures.by_class(PETS, folder="train/").items()] * 2:
            file.writestr(name, data)
        for name, data in pictures.by_class(PETS, folder="test/").items():
            file.writestr(name, data)
    with pytest.raises(recipes.PrepareError, match="train image '.*jpg' is there twice"):
        recipes.prepare(recipes.own_recipe("pets"), tmp_path / "tfds", archive / "pets.zip")


def test_a_damaged_directory_says_so(tmp_path, capsys):
    for name, damage in (("dataset_info.json", "{"), ("features.json", None)):
        assert own(tmp_path / name, pictures.by_class(PETS), "--test_per_class=1") == 0
        (file,) = (tmp_path / name / "tfds").rglob(name)
        file.write_text(damage) if damage else file.unlink()
        capsys.readouterr()
        assert own(tmp_path / name, {}, "--test_per_class=1") == 2
        assert "is damaged" in capsys.readouterr().err
