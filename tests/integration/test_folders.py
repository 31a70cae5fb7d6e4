"""Tests the preparation of image archives, and of folders of images by class."""

import csv
import functools
import io
import logging
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import pictures
from helpers.archives import write_tar
from PIL import ExifTags, Image

from ltkd_jax.data import datasets, records, resize
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import archives, folders, recipes, tfds_writer

PETS = {"cat": 6, "dog": 5, "ant": 4}
PET_FILES = pictures.by_class(PETS)
TRAIN_FILES = pictures.by_class(PETS, folder="train/")
ONE = "--test_per_class=1"


def assert_nothing_left(data_dir):
    assert not data_dir.exists() or not list(data_dir.iterdir())


def take_all(images):
    return images.take(np.arange(len(images)))


def prepare_folder(tmp_path, files, *arguments):
    """Writes files into a folder, prepares it as `pets`, and returns the exit code."""
    root = pictures.write_folder(tmp_path / "images", files)
    data_dir = tmp_path / "tfds"
    options = ["--name=pets", f"--source={root}", f"--data_dir={data_dir}"]
    return command.main(["folder", *options, *arguments])


def prepared_fingerprint(tmp_path, files, *arguments):
    assert prepare_folder(tmp_path, files, *arguments) == 0
    return records.fingerprint("pets", tmp_path / "tfds")


def load_pets(tmp_path, size=16):
    return datasets.load("pets", tmp_path / "tfds", size=size)


# Tiny ImageNet and ImageNet.


@pytest.mark.parametrize("form", ["zip", "folder", "folder around it"])
def test_tiny_imagenet(form, tmp_path):
    files = pictures.tiny_imagenet()
    if form == "zip":
        source = pictures.write_zip(tmp_path / "tiny-imagenet-200.zip", files)
    else:
        source = pictures.write_folder(tmp_path / "any", files)
        if form == "folder":
            source = source / "tiny-imagenet-200"
    recipes.prepare(pictures.tiny_recipe(), tmp_path / "tfds", source)
    source = datasets.load("tiny_imagenet", tmp_path / "tfds")
    assert source.class_names == tuple(sorted(pictures.TINY_CLASSES))
    assert np.bincount(source.train.labels).tolist() == [12] * 3
    assert np.bincount(source.test.labels).tolist() == [2] * 3
    train = take_all(source.train)
    for image, label, key in zip(train.images, train.labels, train.keys):
        name, number = key.split("_")
        assert name == source.class_names[label]
        mode = "L" if number == "1" else "RGB"
        file = pictures.picture(label, int(number), mode=mode)
        expected = Image.open(io.BytesIO(file)).convert("RGB")
        np.testing.assert_array_equal(image, np.asarray(expected))
    small = datasets.load("tiny_imagenet", tmp_path / "tfds", size=32)
    assert small.train.take([0]).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"train/n01000000/images/n01000000_7.JPEG": None},
            "'n01000000' has 11 training images",
        ),
        (
            {"train/n01000000/images/n01000000_7.JPEG": b"no image"},
            "n01000000_7.*not decode",
        ),
        ({"wnids.txt": b"n01000000 n02000000"}, "2 classes, expected 3"),
        ({"wnids.txt": None}, "tiny.zip.*tiny-imagenet-200/wnids.txt"),
        (
            {"val/images/val_3.JPEG": None},
            "'val_3.JPEG' of class 'n01000000', which is not there",
        ),
        (
            {"val/val_annotations.txt": b"val_0.JPEG\tn09"},
            "'val_0.JPEG' of class 'n09'",
        ),
        ({"val/val_annotations.txt": b""}, "0 images, expected 6"),
        (
            {"val/images/val_0.JPEG": pictures.picture(0, 0, size=(32, 32))},
            "'val_0'.*32×32 pixels, expected 64×64",
        ),
    ],
)
def test_tiny_imagenet_changed(change, message, tmp_path):
    files = pictures.tiny_imagenet()
    for name, data in change.items():
        if data is None:
            del files[f"tiny-imagenet-200/{name}"]
        else:
            files[f"tiny-imagenet-200/{name}"] = data
    archive = pictures.write_zip(tmp_path / "tiny.zip", files)
    with pytest.raises((archives.ArchiveError, recipes.PrepareError), match=message):
        recipes.prepare(pictures.tiny_recipe(), tmp_path / "tfds", archive)
    assert_nothing_left(tmp_path / "tfds")


@pytest.mark.parametrize(
    "change, message",
    [("cut", "tiny.zip is no folder"), ("flip", "'n01000000_7'.*CRC")],
)
def test_zip_damaged(change, message, tmp_path):
    archive = pictures.write_zip(tmp_path / "tiny.zip", pictures.tiny_imagenet())
    data = bytearray(archive.read_bytes())
    if change == "cut":
        del data[len(data) // 2 :]
    else:
        data[data.index(b"n01000000_7.JPEG") + 200] ^= 255
    archive.write_bytes(data)
    with pytest.raises((archives.ArchiveError, recipes.PrepareError), match=message):
        recipes.prepare(pictures.tiny_recipe(), tmp_path / "tfds", archive)
    assert_nothing_left(tmp_path / "tfds")


def test_imagenet(tmp_path):
    """Reads both layouts of the validation images, for 3 of the 1,000 classes."""
    stock = recipes.official_recipe("imagenet2012").read.keywords
    wnids = stock["class_names"]
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids)
    assert len(stock["validation_labels"]) == 50_000
    assert set(stock["validation_labels"]) == set(wnids)

    class_names = wnids[:3]
    validation_labels = [wnids[1], wnids[0], wnids[2], wnids[1]]
    train = {}
    expected_train = {}
    for label, name in enumerate(class_names):
        for i in range(2):
            train[f"train/{name}/{name}_{i}.JPEG"] = b""
            expected_train[f"{name}_{i}.JPEG"] = label
    file_names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]
    layouts = {"flat": {}, "by class": {}}
    for name, file_name in zip(validation_labels, file_names):
        layouts["flat"][f"val/{file_name}"] = b""
        layouts["by class"][f"val/{name}/{file_name}"] = b""
    for layout, validation in layouts.items():
        source = pictures.write_folder(tmp_path / layout, train | validation)
        splits = folders.imagenet(
            source, class_names=class_names, validation_labels=validation_labels
        ).splits
        labels = {file.id: file.label for file in splits["train"]}
        assert labels == expected_train
        labels = {file.id: file.label for file in splits["validation"]}
        assert labels == dict(zip(file_names, [1, 0, 2, 1]))
    message = f"folder '{wnids[3]}' is missing .997 such"
    with pytest.raises(archives.ArchiveError, match=message):
        folders.imagenet(tmp_path / "flat", **stock)


def test_imagenet_validation_with_another_image(tmp_path):
    """The labels go by position, so that one image for another would shift them."""
    train = {f"train/{name}/{name}_0.JPEG": b"" for name in ("n01", "n02")}
    first = {"val/ILSVRC2012_val_00000001.JPEG": b""}
    options = dict(class_names=("n01", "n02"), validation_labels=["n02", "n01"])
    for number, other in enumerate(("val/._x.JPEG", "val/copy.JPEG", None)):
        others = {} if other is None else {other: b""}
        source = pictures.write_folder(tmp_path / str(number), train | first | others)
        message = "missing or unexpected: ILSVRC2012_val_00000002"
        with pytest.raises(archives.ArchiveError, match=message):
            folders.imagenet(source, **options)


# What macOS, Windows, Synology and Linux leave behind.
LEFT_BEHIND = (
    "._{}",
    ".{}",
    "Thumbs.db",
    "desktop.ini",
    "__MACOSX/{}",
    "@eaDir/{}/SYNOFILE_THUMB_M.jpg",
    ".Trash/{}",
    "lost+found/{}",
)


def add_hidden(files):
    """Returns the files with hidden ones beside each of them, and in the root."""
    hidden = {form.format("x.JPEG"): b"x" for form in LEFT_BEHIND}
    for path in files:
        folder, slash, name = path.rpartition("/")
        for form in LEFT_BEHIND:
            hidden[f"{folder}{slash}{form.format(name)}"] = b"x"
    return files | hidden


def list_content(files):
    """Returns the id and label of the images of each split."""
    content = {}
    for split, image_files in files.splits.items():
        content[split] = [(file.id, file.label) for file in image_files]
    return content


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize(
    "layout", ["classes", "splits", "tiny_imagenet", "imagenet flat", "imagenet"]
)
def test_hidden_files_are_skipped(layout, form, tmp_path):
    if layout == "tiny_imagenet":
        files = pictures.tiny_imagenet()
        read = pictures.tiny_recipe().read
    elif layout in ("classes", "splits"):
        is_split = layout == "splits"
        files = TRAIN_FILES | pictures.by_class(PETS, folder="test/")
        files = files if is_split else PET_FILES
        read = recipes.custom_recipe("pets", test_per_class=0 if is_split else 1).read
    else:
        read = functools.partial(
            folders.imagenet, class_names=("a", "b"), validation_labels=["b", "a"]
        )
        files = {f"train/{name}/{name}_0.JPEG": b"" for name in ("a", "b")}
        for i, name in enumerate(("b/", "a/"), 1):
            folder = "" if layout == "imagenet flat" else name
            files[f"val/{folder}ILSVRC2012_val_{i:08d}.JPEG"] = b""
    write = pictures.write_zip if form == "zip" else pictures.write_folder
    plain = read(write(tmp_path / "plain", files))
    hidden = read(write(tmp_path / "hidden", add_hidden(files)))
    assert list_content(hidden) == list_content(plain)
    assert hidden.class_names == plain.class_names
    assert hidden.left_out == plain.left_out


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet2012"])
def test_recipe_without_url(name, tmp_path):
    message = f"{name} cannot be downloaded: give --source, the .* from http"
    with pytest.raises(recipes.PrepareError, match=message):
        recipes.prepare(recipes.official_recipe(name), tmp_path)


# Custom folders.


def test_custom_folder(tmp_path, capsys):
    ignored = {"cat/.hidden.jpg": b"", "cat/notes.txt": b"x", ".git/x.jpg": b""}
    files = pictures.by_class(PETS)
    grey = pictures.picture(1, 50, size=(20, 25), mode="L", kind="png")
    files["cat/deep/er/grey.png"] = grey
    files["dog/old.bmp"] = pictures.picture(2, 51, kind="bmp")
    assert prepare_folder(tmp_path, files | ignored, "--test_per_class=2") == 0
    output = capsys.readouterr().out
    assert "pets is prepared" in output
    command_line = recipes.training_command("folder", "pets", tmp_path / "tfds")
    assert output.splitlines()[-1].strip() == command_line
    source = load_pets(tmp_path)
    assert source.class_names == ("ant", "cat", "dog")
    assert np.bincount(source.train.labels).tolist() == [2, 5, 4]
    assert np.bincount(source.test.labels).tolist() == [2] * 3
    assert {*source.train.keys, *source.test.keys} == set(files)
    assert source.train.shape == (16, 16, 3) and source.views.pad == 2
    for split in (source.train, source.test):
        for image, key in zip(take_all(split).images, split.keys):
            original = resize.convert_mode(Image.open(io.BytesIO(files[key])), 3)
            expected = resize.center_crop(original, 16, margin=False)
            np.testing.assert_array_equal(image, expected, err_msg=key)
    assert prepare_folder(tmp_path, files, "--test_per_class=2") == 0
    output = capsys.readouterr().out
    assert "already prepared" in output and "nothing was read" in output


def read_split_table(tmp_path, name="pets"):
    """Returns the rows of `split.csv`."""
    (path,) = (tmp_path / "tfds" / name).glob("*/split.csv")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_split_table(tmp_path):
    """It has every image, also one whose name needs quotes; an old one is kept."""
    files = PET_FILES | {'cat/a, "ü"\'.jpg': pictures.picture(1, 50)}
    assert prepare_folder(tmp_path, files, "--test_per_class=2") == 0
    rows = read_split_table(tmp_path)
    source = load_pets(tmp_path)
    for split, images in (("train", source.train), ("test", source.test)):
        selected = [row for row in rows if row["split"] == split]
        assert [row["key"] for row in selected] == images.keys.tolist()
        assert [int(row["label"]) for row in selected] == images.labels.tolist()
    assert {row["key"] for row in rows} == set(files)
    assert all(row["key"].startswith(f"{row['class']}/") for row in rows)

    # A directory of an earlier version has none.
    (path,) = (tmp_path / "tfds").rglob("split.csv")
    path.unlink()
    assert prepare_folder(tmp_path, files, "--test_per_class=2") == 0
    assert read_split_table(tmp_path) == rows
    path.write_text("mine")
    assert prepare_folder(tmp_path, files, "--test_per_class=2") == 0
    assert path.read_text() == "mine"


def test_split_table_of_imagenet(tmp_path):
    """The test images are called so, although TFDS calls them "validation"."""
    stock = recipes.official_recipe("imagenet2012").read.keywords
    names = stock["class_names"][:2]
    files = pictures.by_class(dict.fromkeys(names, 2), folder="train/")
    for number in (1, 2):
        picture = pictures.picture(0, number)
        files[f"val/ILSVRC2012_val_0000000{number}.JPEG"] = picture
    read = functools.partial(
        folders.imagenet, class_names=names, validation_labels=names[::-1]
    )
    recipe = recipes.Recipe("imagenet2012", (), read)
    source = pictures.write_folder(tmp_path / "images", files)
    recipes.prepare(recipe, tmp_path / "tfds", source)
    rows = read_split_table(tmp_path, "imagenet2012")
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"] * 2
    test_classes = [row["class"] for row in rows if row["split"] == "test"]
    assert test_classes == [names[1], names[0]]


def test_custom_folder_reports_what_is_left_out(tmp_path, caplog):
    files = {**TRAIN_FILES, **pictures.by_class(PETS, folder="test/")}
    files |= pictures.by_class({"cat": 2, "dog": 1}, folder="val/")
    for path in ("a.jfif", "train/cat/b.JFIF", "test/c.jpe", "d.heic", "train/ant/e"):
        files[path] = b"x"
    files |= {"beside.jpg": b"x", "train/beside.png": b"x", "README.txt": b"x"}
    with caplog.at_level(logging.WARNING):
        assert prepare_folder(tmp_path, files) == 0
    lines = {line for line in caplog.messages if line.startswith("left out")}
    assert lines == {
        "left out: 2 files that end in '.jfif': 'a.jfif', 'train/cat/b.JFIF'",
        "left out: 1 files that end in '.jpe': 'test/c.jpe'",
        "left out: 1 files that end in '.heic': 'd.heic'",
        "left out: 1 files that end in '': 'train/ant/e'",
        "left out: 2 images outside of the class folders: 'beside.jpg', "
        "'train/beside.png'",
        "left out: 3 images in 'val/', as 'test/' is the test set: 'val/cat/cat0.jpg', "
        "'val/cat/cat1.jpg', 'val/dog/dog0.jpg'",
    }


def test_custom_folder_reports_many_endings(tmp_path, caplog):
    files = PET_FILES | {f"cat/scan.{i:03}": b"x" for i in range(30)}
    with caplog.at_level(logging.WARNING):
        assert prepare_folder(tmp_path, files, ONE) == 0
    assert len(caplog.messages) == 11
    assert caplog.messages[-1] == "left out: 20 other files"


def test_custom_folder_reports_equal_images(tmp_path, caplog):
    test = {
        f"test/{name}/t.jpg": pictures.picture(9, 9 + i) for i, name in enumerate(PETS)
    }
    files = TRAIN_FILES | test
    files["test/dog/again.jpg"] = files["train/dog/dog3.jpg"]
    files["train/ant/cat.jpg"] = files["train/cat/cat2.jpg"]
    files["train/ant/ant_again.jpg"] = files["train/ant/ant1.jpg"]
    with caplog.at_level(logging.WARNING):
        assert prepare_folder(tmp_path, files) == 0
    in_two_splits, in_two_classes = caplog.messages
    assert "the same image is in training and test, 1 times" in in_two_splits
    assert "train/dog/dog3.jpg" in in_two_splits
    assert "test/dog/again.jpg" in in_two_splits
    assert "the same image is in two classes, 1 times" in in_two_classes
    assert "train/ant/cat.jpg" in in_two_classes
    assert "train/cat/cat2.jpg" in in_two_classes
    assert len(load_pets(tmp_path).train) == 17


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_custom_folder_applies_exif_orientation(kind, tmp_path):
    """Equals Pillow's own transposition, in all eight orientations."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 200
    pixels[:8, :8] = 90
    files = dict(PET_FILES)
    for orientation in range(10):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=kind, exif=exif, quality=100)
        files[f"cat/{orientation}.{kind}"] = file.getvalue()
    assert prepare_folder(tmp_path, files, ONE) == 0
    source = load_pets(tmp_path)
    image_of = {}
    for split in (source.train, source.test):
        image_of |= zip(split.keys, take_all(split).images)
    forms = [  # the published meaning of the values 1 to 8
        pixels,
        pixels[:, ::-1],
        pixels[::-1, ::-1],
        pixels[::-1],
        pixels.swapaxes(0, 1),
        np.rot90(pixels, -1),
        pixels[::-1, ::-1].swapaxes(0, 1),
        np.rot90(pixels),
    ]
    for orientation, expected in enumerate([pixels, *forms, pixels]):
        result = image_of[f"cat/{orientation}.{kind}"].astype(int)
        assert np.abs(result - expected).max() < 12, orientation


def test_custom_folder_keeps_the_bytes_of_upright_images(tmp_path):
    """Also where EXIF data say "upright", or are damaged."""
    files = dict(PET_FILES)
    image = Image.open(io.BytesIO(pictures.picture(0, 99)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    for name, data in (("one", exif), ("damaged", b"Exif\0\0no TIFF header")):
        file = io.BytesIO()
        image.save(file, format="jpeg", exif=data)
        files[f"cat/{name}.jpg"] = file.getvalue()
    assert prepare_folder(tmp_path, files, ONE) == 0
    builder = records.find_builder("pets", tmp_path / "tfds")
    decoders = {"image": tfds.decode.SkipDecoding()}
    stored = {}
    for split in ("train", "test"):
        for example in builder.as_data_source(split, decoders=decoders):
            stored[example["id"].decode()] = example["image"]
    assert stored == files


def test_fingerprint_across_processes(tmp_path):
    """The order of protobuf's maps differs from process to process."""
    code = (
        "import sys; from ltkd_jax.data.prepare import __main__ as command; "
        "sys.exit(command.main(sys.argv[1:]))"
    )
    fingerprints = {prepared_fingerprint(tmp_path, PET_FILES, ONE)}
    source = f"--source={tmp_path / 'images'}"
    for number in range(2):
        data_dir = tmp_path / str(number)
        arguments = ["folder", "--name=pets", source, ONE, f"--data_dir={data_dir}"]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)
        fingerprints.add(records.fingerprint("pets", data_dir))
    assert len(fingerprints) == 1


@pytest.mark.parametrize("change", ["image", "name", "class", "split", "removed"])
def test_fingerprint_shows_a_change(change, tmp_path):
    files = TRAIN_FILES | pictures.by_class(PETS, folder="test/")
    plain = prepared_fingerprint(tmp_path / "plain", files)
    data = files.pop("train/cat/cat5.jpg")
    new_paths = {
        "image": "train/cat/cat5.jpg",
        "name": "train/cat/cat9.jpg",
        "class": "train/dog/cat5.jpg",
        "split": "test/cat/more.jpg",
    }
    if change in new_paths:
        new_data = pictures.picture(0, 99) if change == "image" else data
        files[new_paths[change]] = new_data
    assert prepared_fingerprint(tmp_path / "changed", files) != plain


def test_custom_folder_needs_a_size(tmp_path):
    assert prepare_folder(tmp_path, PET_FILES, ONE) == 0
    with pytest.raises(ValueError, match="set data.image_size"):
        datasets.load("pets", tmp_path / "tfds")
    for name in ("*", "../tfds/pets", "p?ts", ""):
        assert records.find_builder(name, tmp_path / "tfds") is None
    builder = records.find_builder("pets", tmp_path / "tfds")
    train = records.open_records(builder, "train", 8, margin=True)
    assert train.resize_mode == "margin"


def test_custom_folder_index_damaged(tmp_path):
    """A damaged index is made again from the records."""
    assert prepare_folder(tmp_path, PET_FILES, ONE) == 0
    keys = load_pets(tmp_path).train.keys
    paths = sorted((tmp_path / "tfds" / "pets").rglob("index-*.npz"))
    assert [path.name for path in paths] == ["index-test.npz", "index-train.npz"]
    for damage in (b"", b"PK damaged"):
        paths[1].write_bytes(damage)
        np.testing.assert_array_equal(load_pets(tmp_path).train.keys, keys)
        assert paths[1].stat().st_size > len(damage)


@pytest.mark.parametrize(
    "train, test", [("train", "test"), ("train", "val"), ("Train", "Valid")]
)
def test_custom_zip_with_a_split(train, test, tmp_path):
    files = pictures.by_class(PETS, folder=f"pets/{train}/")
    files |= pictures.by_class(dict.fromkeys(PETS, 1), folder=f"pets/{test}/")
    files |= {"__MACOSX/pets/train/cat/._cat0.jpg": b"x"}
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    recipes.prepare(recipes.custom_recipe("pets"), tmp_path / "tfds", archive)
    source = load_pets(tmp_path, size=32)
    assert np.bincount(source.train.labels).tolist() == [4, 6, 5]
    assert len(source.test) == 3


@pytest.mark.parametrize("form", ["cat\\{}", "pets\\cat\\{}", "./cat/{}"])
def test_custom_zip_of_another_system(form, tmp_path):
    """Reads names with backslashes, or that begin with "./"."""
    files = {}
    for path, data in PET_FILES.items():
        class_name, _, name = path.partition("/")
        files[form.replace("cat", class_name).format(name)] = data
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    recipe = recipes.custom_recipe("pets", test_per_class=1)
    recipes.prepare(recipe, tmp_path / "tfds", archive)
    source = load_pets(tmp_path)
    assert {*source.train.keys, *source.test.keys} == set(PET_FILES)


@pytest.mark.parametrize(
    "encoded", ["tétras d'été".encode(), "tétras d'été".encode("cp437")]
)
def test_custom_zip_names_without_the_flag_of_unicode(encoded, tmp_path):
    """Reads UTF-8, which Info-ZIP writes so, and code page 437, as it should be."""
    files = pictures.by_class({"bird": 3, "cat": 3})
    placeholder = "b" * len(encoded)
    renamed = {path.replace("bird", placeholder): files[path] for path in files}
    archive = pictures.write_zip(tmp_path / "pets.zip", renamed)
    # A name in ASCII has no flag.
    content = archive.read_bytes()
    archive.write_bytes(content.replace(placeholder.encode(), encoded))
    recipe = recipes.custom_recipe("pets", test_per_class=1)
    recipes.prepare(recipe, tmp_path / "tfds", archive)
    source = load_pets(tmp_path)
    assert source.class_names == ("cat", "tétras d'été")
    expected = {path.replace("bird", "tétras d'été") for path in files}
    assert {*source.train.keys, *source.test.keys} == expected


def test_custom_split_and_number_to_hold_out(tmp_path):
    files = pictures.by_class(PETS, folder="train/")
    files |= pictures.by_class(dict.fromkeys(PETS, 1), folder="test/")
    source = pictures.write_folder(tmp_path / "images", files)
    with pytest.raises(archives.ArchiveError, match="test_per_class=2: .*in test/"):
        folders.custom(source, test_per_class=2)


def test_custom_archive_of_another_kind(tmp_path):
    archive = write_tar(tmp_path / "pets.tar.gz", PET_FILES)
    with pytest.raises(archives.ArchiveError, match="pets.tar.gz.*unpack.*folder"):
        folders.custom(archive, test_per_class=1)


@pytest.mark.parametrize("name", ["train", "Test", "val"])
def test_custom_class_with_the_name_of_a_split(name, tmp_path):
    files = pictures.by_class({"bus": 3, name: 4})
    source = pictures.write_folder(tmp_path / "images", files)
    content = folders.custom(source, test_per_class=1)
    assert content.class_names == tuple(sorted(("bus", name)))
    assert sum(map(len, content.splits.values())) == 7 and not content.left_out


@pytest.mark.parametrize("names", [("train", "val", "bus"), ("train", "test")])
def test_custom_split_without_class_folders(names, tmp_path):
    files = pictures.by_class(dict.fromkeys(names, 3))
    source = pictures.write_folder(tmp_path / "images", files)
    with pytest.raises(archives.ArchiveError, match="train/ has no class.*rename it"):
        folders.custom(source, test_per_class=1)


def test_custom_folder_of_links(tmp_path):
    pictures.write_folder(tmp_path / "real", pictures.by_class(PETS))
    (tmp_path / "links").mkdir()
    for name in PETS:
        (tmp_path / "links" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "cat" / "loop").symlink_to(tmp_path / "real")
    recipe = recipes.custom_recipe("pets", test_per_class=1)
    recipes.prepare(recipe, tmp_path / "tfds", tmp_path / "links")
    source = load_pets(tmp_path, size=8)
    assert source.class_names == ("ant", "cat", "dog")
    assert np.bincount(source.train.labels)[0] == 3


@pytest.mark.parametrize(
    "files, arguments, phrases",
    [
        (PET_FILES, [], ["--test_per_class=N"]),
        (
            PET_FILES,
            ["--test_per_class=4"],
            ["class 'ant' has 4 images", "hold out fewer"],
        ),
        (PET_FILES | {"bee/x.txt": b""}, [ONE], ["class folder 'bee' has no image"]),
        (pictures.by_class({"cat": 3}), [ONE], ["0 class folders, and at least 2"]),
        (
            TRAIN_FILES | pictures.by_class({"cat": 1, "fly": 1}, folder="test/"),
            [],
            ["class 'ant' is in one of train and test only (3 such"],
        ),
        (
            pictures.by_class({"café": 1, "b": 1}, folder="train/")
            | pictures.by_class({"cafe\u0301": 1, "b": 1}, folder="test/"),
            [],
            ["(2 such classes)", "Unicode form"],
        ),
        (
            PET_FILES | {"cat/cat9.jpg": b"\xff\xd8 no image"},
            [ONE],
            ["'cat/cat9.jpg'", "--skip_damaged"],
        ),
        (
            PET_FILES | {f"ant/ant{i}.jpg": b"" for i in range(4)},
            [ONE, "--skip_damaged"],
            ["images of class 'ant': none of them decodes"],
        ),
        (
            TRAIN_FILES | pictures.by_class(PETS, folder="rest/"),
            [ONE],
            ["rest, train", "beside train one of test", "if train is a class, move"],
        ),
        (
            {f" {name}": data for name, data in PET_FILES.items()},
            [ONE],
            ["' ant'", "rename it"],
        ),
        (
            {f"a\nb{name}": data for name, data in PET_FILES.items()},
            [ONE],
            ["rename it"],
        ),
    ],
)
def test_custom_folder_refused(files, arguments, phrases, tmp_path, capsys):
    assert prepare_folder(tmp_path, files, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # below the progress bars
    assert error.startswith("error: ")
    for phrase in phrases:
        assert phrase in error
    assert_nothing_left(tmp_path / "tfds")


def test_custom_folder_with_an_empty_class(tmp_path, capsys):
    (tmp_path / "images" / "bee").mkdir(parents=True)
    assert prepare_folder(tmp_path, PET_FILES, ONE) == 2
    assert "class folder 'bee' has no image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["Pets", "cifar10", "mnist", "digits", "../x", "folder", "1a"]
)
def test_custom_name_refused(name):
    with pytest.raises(recipes.PrepareError, match="--name"):
        recipes.custom_recipe(name)


def test_custom_folder_skip_damaged(tmp_path, caplog):
    files = TRAIN_FILES | pictures.by_class(PETS, folder="test/")
    intact = files["train/cat/cat3.jpg"]
    files["train/cat/cat3.jpg"] = intact[: len(intact) // 2]
    files["test/dog/dog0.jpg"] = b""
    with caplog.at_level(logging.WARNING):
        assert prepare_folder(tmp_path, files, "--skip_damaged") == 0
    assert "'cat/cat3.jpg' of class 'cat'" in caplog.text
    assert "'dog/dog0.jpg'" in caplog.text
    assert "1 of 15 train images" in caplog.text
    source = load_pets(tmp_path)
    assert np.bincount(source.train.labels).tolist() == [4, 5, 5]
    assert len(source.test) == 14


def test_custom_zip_names_are_not_paths(tmp_path):
    """A zip's absolute names, and those with "..", are never opened as paths."""
    files = PET_FILES | {"/etc/x.jpg": b"", "../../out.jpg": b""}
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    recipe = recipes.custom_recipe("pets", test_per_class=1)
    with pytest.raises((archives.ArchiveError, recipes.PrepareError)):
        recipes.prepare(recipe, tmp_path / "tfds", archive)
    assert set(os.listdir(tmp_path)) <= {"pets.zip", "tfds"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_custom_zip_with_a_duplicate(tmp_path):
    files = TRAIN_FILES | pictures.by_class(PETS, folder="test/")
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("train/cat/cat1.jpg", files["train/cat/cat1.jpg"])
    message = "train image 'cat/cat1.jpg' occurs twice"
    with pytest.raises(recipes.PrepareError, match=message):
        recipes.prepare(recipes.custom_recipe("pets"), tmp_path / "tfds", archive)


def test_custom_folder_in_many_shards(tmp_path, monkeypatch):
    """TFDS's own writer would call TensorFlow when its buffer is full."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    monkeypatch.setattr(tfds_writer, "SHARD_BYTES", 2000)
    files = pictures.by_class(PETS)
    assert prepare_folder(tmp_path, files, ONE) == 0
    paths = sorted((tmp_path / "tfds").rglob("pets-train.array_record*"))
    assert len(paths) > 3
    assert paths[0].name.endswith(f"-00000-of-{len(paths):05d}")
    train = take_all(load_pets(tmp_path).train)
    assert np.bincount(train.labels).tolist() == [3, 5, 4]
    for key, image in zip(train.keys, train.images):
        original = Image.open(io.BytesIO(files[key]))
        expected = resize.center_crop(original, 16, margin=False)
        np.testing.assert_array_equal(image, expected)
    builder = tfds.builder_from_directory(paths[0].parent)
    examples = builder.as_data_source("train")
    assert {example["id"].decode() for example in examples} == set(train.keys)


def test_custom_folder_of_sixteen_bits(tmp_path):
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16)
    pixels = np.tile(ramp, (16, 1))
    files = pictures.by_class(PETS, size=(16, 16))
    for kind in ("png", "tiff"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=kind)
        files[f"cat/deep.{kind}"] = file.getvalue()
    assert prepare_folder(tmp_path, files, ONE) == 0
    source = load_pets(tmp_path)
    image_of = {}
    for split in (source.train, source.test):
        image_of |= zip(split.keys, take_all(split).images)
    for kind in ("png", "tiff"):
        result = image_of[f"cat/deep.{kind}"][..., 0]
        np.testing.assert_array_equal(result, np.round(pixels / 257))


@pytest.mark.parametrize(
    "name, damage", [("dataset_info.json", "{"), ("features.json", None)]
)
def test_prepared_directory_damaged(name, damage, tmp_path, capsys):
    assert prepare_folder(tmp_path, PET_FILES, ONE) == 0
    (path,) = (tmp_path / "tfds").rglob(name)
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    capsys.readouterr()
    assert prepare_folder(tmp_path, {}, ONE) == 2
    assert "is damaged" in capsys.readouterr().err


def test_prepared_record_damaged(tmp_path):
    assert prepare_folder(tmp_path, PET_FILES, ONE) == 0
    train = load_pets(tmp_path).train
    (path,) = (tmp_path / "tfds").rglob("*train.array_record*")
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes(len(data) - half))
    message = f"'{train.keys[3]}' in {path.parent}"
    with pytest.raises(records.DamagedRecordError, match=message):
        train.take([3])
    with pytest.raises(records.DamagedRecordError, match=message):
        train.image(3)
    with pytest.raises(records.DamagedRecordError, match=message):
        train.random_crop(3, np.random.default_rng(0))
