"""Image archives and folders of images by class: what is read, and what is refused."""

import io
import logging
import os
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import pictures
from PIL import Image

from ltkd_jax.data import datasets, records, resize
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import archives, folders, recipes, tfds_writer

PETS = {"cat": 6, "dog": 5, "ant": 4}


def assert_nothing_left(data_dir):
    assert not data_dir.exists() or not list(data_dir.iterdir())


def whole(part):
    return part.take(np.arange(len(part)))


def prepare_folder(tmp_path, files, *arguments):
    """Returns the exit code of preparing a folder of these files as `pets`."""
    root = pictures.write_folder(tmp_path / "images", files)
    return command.main(
        [
            "folder",
            "--name=pets",
            f"--source={root}",
            f"--data_dir={tmp_path / 'tfds'}",
            *arguments,
        ]
    )


# Tiny ImageNet and ImageNet.


@pytest.mark.parametrize("form", ["zip", "folder", "folder around it"])
def test_tiny_imagenet(form, tmp_path):
    if form == "zip":
        source = pictures.write_zip(
            tmp_path / "tiny-imagenet-200.zip", pictures.tiny_imagenet()
        )
    else:
        source = pictures.write_folder(tmp_path / "any", pictures.tiny_imagenet())
        source = source if form == "folder around it" else source / "tiny-imagenet-200"
    recipes.prepare(pictures.tiny_recipe(), tmp_path / "tfds", source)
    source = datasets.load("tiny_imagenet", tmp_path / "tfds")
    assert source.class_names == tuple(sorted(pictures.TINY_CLASSES))
    assert np.bincount(source.train.labels).tolist() == [12] * 3
    assert np.bincount(source.test.labels).tolist() == [2] * 3
    train = whole(source.train)
    for image, label, key in zip(train.images, train.labels, train.keys):
        name, number = key.split("_")
        assert name == source.class_names[label]
        mode = "L" if number == "1" else "RGB"
        file = Image.open(io.BytesIO(pictures.picture(label, int(number), mode=mode)))
        np.testing.assert_array_equal(image, np.asarray(file.convert("RGB")))
    assert datasets.load("tiny_imagenet", tmp_path / "tfds", size=32).train.take(
        [0]
    ).images.shape == (1, 32, 32, 3)


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
    files = pictures.tiny_imagenet() | {
        f"tiny-imagenet-200/{name}": data for name, data in change.items()
    }
    files = {name: data for name, data in files.items() if data is not None}
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
    """Reads both layouts of the validation images, with TFDS's own thousand classes."""
    stock = recipes.official_recipe("imagenet2012").read.keywords
    wnids, all_validation_labels = stock["class_names"], stock["validation_labels"]
    assert (
        len(wnids) == 1000
        and list(wnids) == sorted(wnids)
        and len(all_validation_labels) == 50_000
    )
    assert set(all_validation_labels) == set(wnids)
    names, validation_labels = wnids[:3], [wnids[1], wnids[0], wnids[2], wnids[1]]
    train = {f"train/{name}/{name}_{i}.JPEG": b"" for name in names for i in range(2)}
    file_names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]
    layouts = {
        "flat": {f"val/{file_name}": b"" for file_name in file_names},
        "by class": {
            f"val/{name}/{file_name}": b""
            for name, file_name in zip(validation_labels, file_names)
        },
    }
    for layout, validation in layouts.items():
        source = pictures.write_folder(tmp_path / layout, train | validation)
        splits = folders.imagenet(
            source, class_names=names, validation_labels=validation_labels
        ).splits
        labels = {
            split: {entry.id: entry.label for entry in entries}
            for split, entries in splits.items()
        }
        assert labels["train"] == {
            f"{name}_{i}.JPEG": names.index(name) for name in names for i in range(2)
        }
        assert labels["validation"] == dict(zip(file_names, [1, 0, 2, 1]))
    with pytest.raises(
        archives.ArchiveError, match=f"folder '{wnids[3]}' is missing .997 such"
    ):
        folders.imagenet(
            tmp_path / "flat",
            class_names=wnids,
            validation_labels=all_validation_labels,
        )


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet2012"])
def test_recipe_without_url(name, tmp_path):
    with pytest.raises(
        recipes.PrepareError,
        match=f"{name} cannot be downloaded: give --source, the .* from http",
    ):
        recipes.prepare(recipes.official_recipe(name), tmp_path)


# One's own folder.


def test_own_folder(tmp_path, capsys):
    ignored = {"cat/.hidden.jpg": b"", "cat/notes.txt": b"x", ".git/x.jpg": b""}
    files = pictures.by_class(PETS)
    files["cat/deep/er/grey.png"] = pictures.picture(
        1, 50, size=(20, 25), mode="L", kind="png"
    )
    files["dog/old.bmp"] = pictures.picture(2, 51, kind="bmp")
    assert prepare_folder(tmp_path, files | ignored, "--test_per_class=2") == 0
    assert "pets is prepared" in capsys.readouterr().out
    source = datasets.load("pets", tmp_path / "tfds", size=16)
    assert source.class_names == ("ant", "cat", "dog")
    assert np.bincount(source.train.labels).tolist() == [2, 5, 4]
    assert np.bincount(source.test.labels).tolist() == [2] * 3
    assert {*source.train.keys, *source.test.keys} == set(files)
    assert source.train.shape == (16, 16, 3) and source.views.pad == 2
    for part in (source.train, source.test):
        for image, key in zip(whole(part).images, part.keys):
            original = resize.convert_mode(Image.open(io.BytesIO(files[key])), 3)
            np.testing.assert_array_equal(
                image, resize.center_crop(original, 16, margin=False), err_msg=key
            )
    assert prepare_folder(tmp_path, files, "--test_per_class=2") == 0
    output = capsys.readouterr().out
    assert "already prepared" in output and "nothing was read" in output


def test_own_folder_needs_a_size(tmp_path):
    assert prepare_folder(tmp_path, pictures.by_class(PETS), "--test_per_class=1") == 0
    with pytest.raises(ValueError, match="set data.image_size"):
        datasets.load("pets", tmp_path / "tfds")
    for name in ("*", "../tfds/pets", "p?ts", ""):
        assert records.find_builder(name, tmp_path / "tfds") is None
    builder = records.find_builder("pets", tmp_path / "tfds")
    assert records.open_records(builder, "train", 8, margin=True).resize_mode == "margin"


def test_own_folder_index_damaged(tmp_path):
    """The labels and keys of large images are kept beside them; a damaged copy is only a copy."""
    assert prepare_folder(tmp_path, pictures.by_class(PETS), "--test_per_class=1") == 0
    keys = datasets.load("pets", tmp_path / "tfds", size=16).train.keys
    paths = sorted((tmp_path / "tfds" / "pets").rglob("index-*.npz"))
    assert [path.name for path in paths] == ["index-test.npz", "index-train.npz"]
    for damage in (b"", b"PK damaged"):
        paths[1].write_bytes(damage)
        np.testing.assert_array_equal(
            datasets.load("pets", tmp_path / "tfds", size=16).train.keys, keys
        )
        assert paths[1].stat().st_size > len(damage)


@pytest.mark.parametrize(
    "train, test", [("train", "test"), ("train", "val"), ("Train", "Valid")]
)
def test_own_zip_with_a_split(train, test, tmp_path):
    files = pictures.by_class(PETS, folder=f"pets/{train}/")
    files |= pictures.by_class(dict.fromkeys(PETS, 1), folder=f"pets/{test}/")
    files |= {"__MACOSX/pets/train/cat/._cat0.jpg": b"x"}
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    recipes.prepare(recipes.custom_recipe("pets"), tmp_path / "tfds", archive)
    source = datasets.load("pets", tmp_path / "tfds", size=32)
    assert (
        np.bincount(source.train.labels).tolist() == [4, 6, 5] and len(source.test) == 3
    )


def test_own_folder_of_links(tmp_path):
    pictures.write_folder(tmp_path / "real", pictures.by_class(PETS))
    (tmp_path / "links").mkdir()
    for name in PETS:
        (tmp_path / "links" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "cat" / "loop").symlink_to(tmp_path / "real")
    recipes.prepare(
        recipes.custom_recipe("pets", test_per_class=1),
        tmp_path / "tfds",
        tmp_path / "links",
    )
    source = datasets.load("pets", tmp_path / "tfds", size=8)
    assert (
        source.class_names == ("ant", "cat", "dog")
        and np.bincount(source.train.labels)[0] == 3
    )


SPLIT = pictures.by_class(PETS, folder="train/") | pictures.by_class(
    {"cat": 1, "fly": 1}, folder="test/"
)
ONE = "--test_per_class=1"


@pytest.mark.parametrize(
    "files, arguments, parts",
    [
        (pictures.by_class(PETS), [], ["--test_per_class=N"]),
        (
            pictures.by_class(PETS),
            ["--test_per_class=4"],
            ["class 'ant' has 4 images", "hold out fewer"],
        ),
        (
            pictures.by_class(PETS) | {"bee/x.txt": b""},
            [ONE],
            ["class folder 'bee' has no image"],
        ),
        (pictures.by_class({"cat": 3}), [ONE], ["0 class folders, and at least 2"]),
        (SPLIT, [], ["class 'ant' is in one of train and test only (3 such"]),
        (
            pictures.by_class(PETS) | {"cat/cat9.jpg": b"\xff\xd8 no image"},
            [ONE],
            ["'cat/cat9.jpg'", "--skip_damaged"],
        ),
        (
            pictures.by_class(PETS) | {f"ant/ant{i}.jpg": b"" for i in range(4)},
            [ONE, "--skip_damaged"],
            ["images of class 'ant': none of them decodes"],
        ),
        (
            pictures.by_class(PETS, folder="train/")
            | pictures.by_class(PETS, folder="rest/"),
            [ONE],
            ["rest, train", "beside train one of test"],
        ),
        (
            {f" {name}": data for name, data in pictures.by_class(PETS).items()},
            [ONE],
            ["' ant'", "rename it"],
        ),
        (
            {f"a\nb{name}": data for name, data in pictures.by_class(PETS).items()},
            [ONE],
            ["rename it"],
        ),
    ],
)
def test_own_folder_refused(files, arguments, parts, tmp_path, capsys):
    assert prepare_folder(tmp_path, files, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # below the progress bars
    assert error.startswith("error: ")
    for part in parts:
        assert part in error
    assert_nothing_left(tmp_path / "tfds")


def test_own_folder_with_an_empty_class(tmp_path, capsys):
    (tmp_path / "images" / "bee").mkdir(parents=True)
    assert prepare_folder(tmp_path, pictures.by_class(PETS), ONE) == 2
    assert "class folder 'bee' has no image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["Pets", "cifar10", "mnist", "digits", "../x", "folder", "1a"]
)
def test_own_name_refused(name):
    with pytest.raises(recipes.PrepareError, match="--name"):
        recipes.custom_recipe(name)


def test_own_folder_skip_damaged(tmp_path, caplog):
    files = pictures.by_class(PETS, folder="train/") | pictures.by_class(
        PETS, folder="test/"
    )
    good = files["train/cat/cat3.jpg"]
    files["train/cat/cat3.jpg"] = good[: len(good) // 2]
    files["test/dog/dog0.jpg"] = b""
    with caplog.at_level(logging.WARNING):
        assert prepare_folder(tmp_path, files, "--skip_damaged") == 0
    for part in (
        "'cat/cat3.jpg' of class 'cat'",
        "'dog/dog0.jpg'",
        "1 of 15 train images",
    ):
        assert part in caplog.text
    source = datasets.load("pets", tmp_path / "tfds", size=16)
    assert (
        np.bincount(source.train.labels).tolist() == [4, 5, 5]
        and len(source.test) == 14
    )


def test_own_zip_names_are_not_paths(tmp_path):
    """A zip's absolute and climbing names are never opened as paths."""
    files = pictures.by_class(PETS) | {"/etc/x.jpg": b"", "../../out.jpg": b""}
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    with pytest.raises((archives.ArchiveError, recipes.PrepareError)):
        recipes.prepare(
            recipes.custom_recipe("pets", test_per_class=1), tmp_path / "tfds", archive
        )
    assert set(os.listdir(tmp_path)) <= {"pets.zip", "tfds"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_own_zip_with_a_duplicate(tmp_path):
    files = pictures.by_class(PETS, folder="train/") | pictures.by_class(
        PETS, folder="test/"
    )
    archive = pictures.write_zip(tmp_path / "pets.zip", files)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("train/cat/cat1.jpg", files["train/cat/cat1.jpg"])
    with pytest.raises(
        recipes.PrepareError, match="train image 'cat/cat1.jpg' is there twice"
    ):
        recipes.prepare(recipes.custom_recipe("pets"), tmp_path / "tfds", archive)


def test_own_folder_in_many_files(tmp_path, monkeypatch):
    """TFDS's own writer would call TensorFlow beyond its buffer; ours has none, and starts a new file."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    monkeypatch.setattr(tfds_writer, "SHARD_BYTES", 2000)
    files = pictures.by_class(PETS)
    assert prepare_folder(tmp_path, files, ONE) == 0
    paths = sorted(
        path.name for path in (tmp_path / "tfds").rglob("pets-train.array_record*")
    )
    assert len(paths) > 3 and paths[0].endswith(f"-00000-of-{len(paths):05d}")
    train = whole(datasets.load("pets", tmp_path / "tfds", size=16).train)
    assert np.bincount(train.labels).tolist() == [3, 5, 4]
    for key, image in zip(train.keys, train.images):
        np.testing.assert_array_equal(
            image, resize.center_crop(Image.open(io.BytesIO(files[key])), 16, margin=False)
        )
    builder = tfds.builder_from_directory(next((tmp_path / "tfds" / "pets").iterdir()))
    assert {
        example["id"].decode() for example in builder.as_data_source("train")
    } == set(train.keys)


def test_own_folder_of_sixteen_bits(tmp_path):
    ramp = np.ascontiguousarray(
        np.broadcast_to(np.linspace(0, 65535, 16, dtype=np.uint16), (16, 16))
    )
    files = pictures.by_class(PETS, size=(16, 16))
    for kind in ("png", "tiff"):
        file = io.BytesIO()
        Image.fromarray(ramp).save(file, format=kind)
        files[f"cat/deep.{kind}"] = file.getvalue()
    assert prepare_folder(tmp_path, files, ONE) == 0
    source = datasets.load("pets", tmp_path / "tfds", size=16)
    images = {
        key: image
        for part in (source.train, source.test)
        for key, image in zip(part.keys, whole(part).images)
    }
    for kind in ("png", "tiff"):
        np.testing.assert_array_equal(
            images[f"cat/deep.{kind}"][..., 0], np.round(ramp / 257)
        )


@pytest.mark.parametrize(
    "name, damage", [("dataset_info.json", "{"), ("features.json", None)]
)
def test_prepared_directory_damaged(name, damage, tmp_path, capsys):
    assert prepare_folder(tmp_path, pictures.by_class(PETS), ONE) == 0
    (path,) = (tmp_path / "tfds").rglob(name)
    path.unlink() if damage is None else path.write_text(damage)
    capsys.readouterr()
    assert prepare_folder(tmp_path, {}, ONE) == 2
    assert "is damaged" in capsys.readouterr().err


def test_prepared_record_damaged(tmp_path):
    assert prepare_folder(tmp_path, pictures.by_class(PETS), ONE) == 0
    train = datasets.load("pets", tmp_path / "tfds", size=16).train
    (path,) = (tmp_path / "tfds").rglob("*train.array_record*")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    key, folder = train.keys[3], path.parent
    for read in (
        lambda: train.take([3]),
        lambda: train.image(3),
        lambda: train.random_crop(3, np.random.default_rng(0)),
    ):
        with pytest.raises(records.DamagedRecordError, match=f"'{key}' in {folder}"):
            read()
