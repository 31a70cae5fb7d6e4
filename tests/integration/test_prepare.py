"""Preparation: fabricated archives in the true layouts, and a server that misbehaves."""

import dataclasses
import http.server
import pathlib
import pickle
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.archives import (
    ARCHIVES,
    LAYOUTS,
    binary_archive,
    cifar_recipe,
    class_names,
    fabricate,
    fashion_mnist,
    sha256,
    write_tar,
)
from helpers.content import Evil
from helpers.pictures import write_folder

from ltkd_jax.data import records
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import archives, download, recipes


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def cifar10(tmp_path):
    """The path and the recipe of a small CIFAR-10."""
    path = tmp_path / "a.tar.gz"
    return path, cifar_recipe(
        "cifar10", binary_archive(path, "cifar10", fabricate("cifar10"))
    )


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_cifar_read_by_tfds(name, archive, tmp_path):
    data = fabricate(name)
    recipe = cifar_recipe(name, ARCHIVES[archive](tmp_path / "a.tar.gz", name, data))
    data_dir = tmp_path / "tfds"
    assert (
        recipes.prepare(recipe, data_dir, tmp_path / "a.tar.gz")
        == data_dir / name / "3.0.2"
    )
    assert [path.name for path in data_dir.iterdir()] == [name]

    builder = tfds.builder(name, data_dir=data_dir)
    assert (
        builder.is_prepared()
        and type(builder).__module__ == "tensorflow_datasets.image_classification.cifar"
    )
    for split, (planes, labels) in data.items():
        examples = sorted(
            builder.as_data_source(split), key=lambda example: example["id"]
        )
        assert [example["id"].decode() for example in examples] == [
            f"{split}_{i:05d}" for i in range(len(planes))
        ]
        images = [example["image"].transpose(2, 0, 1).ravel() for example in examples]
        np.testing.assert_array_equal(images, planes)
        for label, values in labels.items():
            assert builder.info.features[label].names == class_names(name, label)
            np.testing.assert_array_equal(
                [example[label] for example in examples], values
            )


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_fashion_mnist(form, tmp_path):
    recipe, data, files = fashion_mnist()
    if form == "folder":
        source = write_folder(tmp_path / "files", files)
    else:
        source = write_tar(
            tmp_path / "a.tar.gz",
            {f"./{name}": content for name, content in files.items()},
        )
    recipes.prepare(recipe, tmp_path / "tfds", source)
    builder = tfds.builder("fashion_mnist", data_dir=tmp_path / "tfds")
    for split, (images, labels) in data.items():
        pairs = [
            (example["image"].tolist(), example["label"])
            for example in builder.as_data_source(split)
        ]
        assert len(pairs) == len(labels)
        for image, label in zip(images[..., None].tolist(), labels):
            assert (image, label) in pairs


# What is refused.


@pytest.mark.parametrize("change", ["cut", "flip"])
@pytest.mark.parametrize("archive", ARCHIVES)
def test_cifar_changed(archive, change, tmp_path):
    source = tmp_path / "a.tar.gz"
    layout = ARCHIVES[archive](source, "cifar100", fabricate("cifar100"))
    data = bytearray(source.read_bytes())
    if change == "cut":
        del data[-1]
    else:
        data[len(data) // 2] ^= 1
    source.write_bytes(data)
    with pytest.raises(archives.ArchiveError) as error:
        archives.read_cifar(source, layout)
    for part in (
        "a.tar.gz",
        "official",
        layout.binary_sha256,
        layout.pickle_sha256,
        sha256(data),
    ):
        assert part in str(error.value)


def test_cifar_pickle_of_another_archive_is_not_loaded(tmp_path):
    names = ("train", "test", "meta")
    evil = pickle.dumps(Evil(str(tmp_path / "mark")))
    source = write_tar(
        tmp_path / "a.tar.gz", {f"cifar-100-python/{name}": evil for name in names}
    )
    with pytest.raises(archives.ArchiveError, match="found"):
        archives.read_cifar(source, archives.CIFAR100)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"no gzip", "damaged"),
        (None, "has no file"),
        ("train-images-idx3-ubyte.gz", "expected"),
    ],
    ids=["damaged", "missing", "another"],
)
def test_idx_changed(data, message, tmp_path):
    recipe, _, files = fashion_mnist()
    name = "train-labels-idx1-ubyte.gz"
    files[name] = files.get(data, data)
    source = write_folder(
        tmp_path,
        {name: content for name, content in files.items() if content is not None},
    )
    with pytest.raises(archives.ArchiveError, match=message) as error:
        recipe.read(source)
    assert name in str(error.value)


def test_idx_archive_cut(tmp_path):
    recipe, _, files = fashion_mnist()
    source = write_tar(tmp_path / "a.tar.gz", files)
    source.write_bytes(source.read_bytes()[:-4000])
    with pytest.raises(archives.ArchiveError, match="a.tar.gz is truncated"):
        recipe.read(source)


def test_failure_while_writing_leaves_nothing(tmp_path):
    content = archives.DecodedImages(
        {
            "train": (
                np.zeros((3, 32, 32, 3), np.uint8),
                {"label": np.array([0, 1, 10])},
            )
        },
        {},
    )
    with pytest.raises(Exception, match="10"):
        recipes.prepare(
            recipes.Recipe("cifar10", (), lambda _: content), tmp_path, "any"
        )
    assert files_in(tmp_path) == []


def test_directory_in_the_way_is_kept(cifar10, tmp_path):
    source, recipe = cifar10
    write_folder(tmp_path, {"tfds/cifar10/3.0.2/mine.txt": b"precious"})
    with pytest.raises(recipes.PrepareError, match="in the way"):
        recipes.prepare(recipe, tmp_path / "tfds", source)
    assert files_in(tmp_path / "tfds") == [
        "cifar10",
        "cifar10/3.0.2",
        "cifar10/3.0.2/mine.txt",
    ]


# The command line, which knows the official checksums only.


@pytest.mark.parametrize("name", LAYOUTS)
def test_command_refuses_another_archive(name, tmp_path, capsys):
    source = tmp_path / "a.tar.gz"
    binary_archive(source, name, fabricate(name))
    assert (
        command.main(
            [name, "--data_dir", str(tmp_path / "tfds"), "--source", str(source)]
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "expected" in err and "official" in err
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_command_without_the_source(name, tmp_path, capsys):
    assert (
        command.main(
            [
                name,
                "--data_dir",
                str(tmp_path / "tfds"),
                "--source",
                str(tmp_path / "none"),
            ]
        )
        == 2
    )
    assert "No such file" in capsys.readouterr().err
    assert files_in(tmp_path) == []


def test_command_again(cifar10, tmp_path, capsys):
    source, recipe = cifar10
    written = recipes.prepare(recipe, tmp_path / "tfds", source)
    assert command.main(["cifar10", "--data_dir", str(tmp_path / "tfds")]) == 0
    assert capsys.readouterr().out == f"cifar10 is already prepared: {written}\n"


def test_official_recipes():
    assert [file.name for file in recipes.official_recipe("cifar100").downloads] == [
        "cifar-100-binary.tar.gz"
    ]
    for name, layout in LAYOUTS.items():
        assert recipes.official_recipe(name).downloads[0].sha256 == layout.binary_sha256
        assert recipes.official_recipe(name).read.keywords["layout"] == layout
    assert {file.name for file in recipes.official_recipe("fashion_mnist").downloads} == set(
        archives.FASHION_MNIST_SHA256
    )


# Downloads, from a server on this machine.


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; can ignore ranges, and cut an answer short once."""

    files, ranges, cut_after, requests = {}, True, None, []

    def do_GET(self):
        server = type(self)
        server.requests.append(self.headers.get("Range"))
        data = server.files.get(self.path.lstrip("/"))
        if data is None:
            return self.send_error(404)
        start = (
            int(self.headers["Range"][6:-1])
            if "Range" in self.headers and server.ranges
            else 0
        )
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end, server.cut_after = server.cut_after, None
        self.wfile.write(data[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The handler class and the address of a server of this test's own."""
    handler = type("Own", (Handler,), {"files": {}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(
            target=running.serve_forever, kwargs={"poll_interval": 0.01}
        )
        thread.start()
        yield handler, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


DATA = np.random.default_rng(0).bytes(1_000_000)


def remote(address, *, name="a.bin", data=DATA):
    return download.RemoteFile(f"{address}/{name}", name, len(data), sha256(data))


def test_fetch(server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = DATA
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert download.fetch(remote(address), folder).read_bytes() == DATA
    assert files_in(folder) == ["a.bin"]
    assert handler.requests == [None]  # the second call downloaded nothing


@pytest.mark.parametrize(
    "ranges", [True, False], ids=["resumed", "server ignores ranges"]
)
def test_fetch_interrupted(ranges, server, tmp_path):
    handler, address = server
    handler.files["a.bin"], handler.cut_after, handler.ranges = DATA, 400_000, ranges
    with pytest.raises(download.DownloadError, match="run the command again"):
        download.fetch(remote(address), tmp_path)
    received = (tmp_path / "a.bin.part").stat().st_size
    assert 0 < received <= 400_000
    assert download.fetch(remote(address), tmp_path).read_bytes() == DATA
    assert files_in(tmp_path) == ["a.bin"] and handler.requests == [
        None,
        f"bytes={received}-",
    ]


@pytest.mark.parametrize(
    "data", [DATA[:-1] + b"?", DATA + DATA], ids=["changed", "longer"]
)
def test_fetch_wrong_checksum(data, server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = data
    with pytest.raises(
        download.DownloadError, match=f"sha256 expected {sha256(DATA)}, found"
    ):
        download.fetch(remote(address), tmp_path)
    assert files_in(tmp_path) == []


def test_fetch_verifies_an_existing_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"something else")
    with pytest.raises(download.DownloadError, match="the file was removed"):
        download.fetch(remote("http://127.0.0.1:9"), tmp_path)
    assert files_in(tmp_path) == []


def test_fetch_missing(server, tmp_path):
    with pytest.raises(download.DownloadError, match="404.*--source"):
        download.fetch(remote(server[1]), tmp_path)
    assert files_in(tmp_path) == []


def test_fetch_unreachable(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as unused:
        port = unused.server_port
    with pytest.raises(download.DownloadError, match=f"127.0.0.1:{port}.*--source"):
        download.fetch(remote(f"http://127.0.0.1:{port}"), tmp_path)


def test_prepare_from_the_network(server, cifar10, tmp_path):
    handler, address = server
    data = cifar10[0].read_bytes()
    handler.files["a.tar.gz"] = data
    recipe = dataclasses.replace(
        cifar10[1], downloads=(remote(address, name="a.tar.gz", data=data),)
    )
    written = recipes.prepare(recipe, tmp_path / "tfds")
    assert (
        pathlib.Path(records.find_builder("cifar10", tmp_path / "tfds").data_path)
        == written
    )
    assert (tmp_path / "tfds" / "downloads" / "cifar10" / "a.tar.gz").is_file()
