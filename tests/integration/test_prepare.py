"""Tests preparation from fabricated archives, and from a server that misbehaves."""

import dataclasses
import http.server
import pathlib
import pickle
import shlex
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
from helpers.content import Malicious
from helpers.pictures import write_folder

from experiments.config import load
from ltkd_jax.data import records
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import archives, download, recipes


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def cifar10(tmp_path):
    """Returns the path and the recipe of a small CIFAR-10."""
    path = tmp_path / "a.tar.gz"
    layout = binary_archive(path, "cifar10", fabricate("cifar10"))
    return path, cifar_recipe("cifar10", layout)


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_cifar_read_by_tfds(name, archive, tmp_path):
    data = fabricate(name)
    source = tmp_path / "a.tar.gz"
    recipe = cifar_recipe(name, ARCHIVES[archive](source, name, data))
    data_dir = tmp_path / "tfds"
    written = recipes.prepare(recipe, data_dir, source)
    assert written == data_dir / name / "3.0.2"
    assert [path.name for path in data_dir.iterdir()] == [name]

    builder = tfds.builder(name, data_dir=data_dir)
    assert builder.is_prepared()
    module = type(builder).__module__
    assert module == "tensorflow_datasets.image_classification.cifar"
    for split, (planes, labels) in data.items():
        examples = list(builder.as_data_source(split))
        examples.sort(key=lambda example: example["id"])
        ids = [example["id"].decode() for example in examples]
        assert ids == [f"{split}_{i:05d}" for i in range(len(planes))]
        images = [example["image"].transpose(2, 0, 1).ravel() for example in examples]
        np.testing.assert_array_equal(images, planes)
        for label, values in labels.items():
            assert builder.info.features[label].names == class_names(name, label)
            result = [example[label] for example in examples]
            np.testing.assert_array_equal(result, values)


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_fashion_mnist(form, tmp_path):
    recipe, data, files = fashion_mnist()
    if form == "folder":
        source = write_folder(tmp_path / "files", files)
    else:
        members = {f"./{name}": content for name, content in files.items()}
        source = write_tar(tmp_path / "a.tar.gz", members)
    recipes.prepare(recipe, tmp_path / "tfds", source)
    builder = tfds.builder("fashion_mnist", data_dir=tmp_path / "tfds")
    for split, (images, labels) in data.items():
        examples = [
            (example["image"].tolist(), example["label"])
            for example in builder.as_data_source(split)
        ]
        assert len(examples) == len(labels)
        for image, label in zip(images[..., None].tolist(), labels):
            assert (image, label) in examples


# Damaged and malicious sources.


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
    message = str(error.value)
    assert "a.tar.gz" in message and "official" in message
    for digest in (layout.binary_sha256, layout.pickle_sha256, sha256(data)):
        assert digest in message


def test_cifar_pickle_other_archive(tmp_path):
    data = pickle.dumps(Malicious(str(tmp_path / "mark")))
    members = {f"cifar-100-python/{name}": data for name in ("train", "test", "meta")}
    source = write_tar(tmp_path / "a.tar.gz", members)
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
    if data is None:
        del files[name]
    source = write_folder(tmp_path, files)
    with pytest.raises(archives.ArchiveError, match=message) as error:
        recipe.read(source)
    assert name in str(error.value)


def test_idx_archive_cut(tmp_path):
    recipe, _, files = fashion_mnist()
    source = write_tar(tmp_path / "a.tar.gz", files)
    source.write_bytes(source.read_bytes()[:-4000])
    with pytest.raises(archives.ArchiveError, match="a.tar.gz is truncated"):
        recipe.read(source)


def test_failed_write_leaves_nothing(tmp_path):
    images = np.zeros((3, 32, 32, 3), np.uint8)
    labels = {"label": np.array([0, 1, 10])}
    content = archives.DecodedImages({"train": (images, labels)}, class_names={})
    recipe = recipes.Recipe("cifar10", (), lambda _: content)
    with pytest.raises(Exception, match="10"):
        recipes.prepare(recipe, tmp_path, "any")
    assert list_files(tmp_path) == []


def test_existing_directory_is_kept(cifar10, tmp_path):
    source, recipe = cifar10
    write_folder(tmp_path, {"tfds/cifar10/3.0.2/notes.txt": b"precious"})
    with pytest.raises(recipes.PrepareError, match="in the way"):
        recipes.prepare(recipe, tmp_path / "tfds", source)
    assert list_files(tmp_path / "tfds") == [
        "cifar10",
        "cifar10/3.0.2",
        "cifar10/3.0.2/notes.txt",
    ]


# The command line, which accepts the official checksums only.


@pytest.mark.parametrize("name", LAYOUTS)
def test_command_other_archive(name, tmp_path, capsys):
    source = tmp_path / "a.tar.gz"
    binary_archive(source, name, fabricate(name))
    data_dir = tmp_path / "tfds"
    arguments = [name, "--data_dir", str(data_dir), "--source", str(source)]
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "expected" in err and "official" in err
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_command_without_the_source(name, tmp_path, capsys):
    data_dir = tmp_path / "tfds"
    absent = tmp_path / "none"
    arguments = [name, "--data_dir", str(data_dir), "--source", str(absent)]
    assert command.main(arguments) == 2
    assert "No such file" in capsys.readouterr().err
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("dataset", recipes.DATASETS)
def test_training_command(dataset):
    name = "birds" if dataset == "folder" else dataset
    words = shlex.split(recipes.training_command(dataset, name, pathlib.Path("my dir")))
    *program, config, data_dir = words
    assert program == ["python", "-m", "experiments.main"]
    assert load.load_config(config.removeprefix("--config=")).data.name == name
    assert data_dir == "--config.data.dir=my dir"


def test_command_again(cifar10, tmp_path, capsys):
    source, recipe = cifar10
    written = recipes.prepare(recipe, tmp_path / "tfds", source)
    assert command.main(["cifar10", "--data_dir", str(tmp_path / "tfds")]) == 0
    first_line, *others = capsys.readouterr().out.splitlines()
    assert first_line == f"cifar10 is already prepared: {written}"
    command_line = recipes.training_command("cifar10", "cifar10", tmp_path / "tfds")
    assert others[-1].strip() == command_line


@pytest.mark.parametrize("depth", ["cifar10", "cifar10/3.0.2"])
def test_command_into_a_data_set(depth, cifar10, tmp_path, capsys):
    source, recipe = cifar10
    data_dir = tmp_path / "tfds"
    recipes.prepare(recipe, data_dir, source)
    before = list_files(data_dir)
    arguments = ["cifar10", f"--source={source}", f"--data_dir={data_dir / depth}"]
    assert command.main(arguments) == 2
    assert f"the directory above it, {data_dir}," in capsys.readouterr().err
    assert list_files(data_dir) == before


def test_official_recipes():
    (cifar100_file,) = recipes.official_recipe("cifar100").downloads
    assert cifar100_file.name == "cifar-100-binary.tar.gz"
    for name, layout in LAYOUTS.items():
        recipe = recipes.official_recipe(name)
        assert recipe.downloads[0].sha256 == layout.binary_sha256
        assert recipe.read.keywords["layout"] == layout
    fashion_files = recipes.official_recipe("fashion_mnist").downloads
    file_names = {file.name for file in fashion_files}
    assert file_names == set(archives.FASHION_MNIST_SHA256)


# Downloads, from a server on this machine.


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; can ignore ranges, and cut an answer short once."""

    files = {}
    accepts_ranges = True
    cut_after = None  # bytes
    requested_ranges = []

    def do_GET(self):
        server = type(self)
        requested_range = self.headers.get("Range")
        server.requested_ranges.append(requested_range)
        data = server.files.get(self.path.lstrip("/"))
        if data is None:
            self.send_error(404)
            return
        start = 0
        if requested_range and server.accepts_ranges:
            start = int(requested_range.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : server.cut_after])
        server.cut_after = None

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Yields the handler class and the address of a server for one test."""
    handler = type("TestHandler", (Handler,), {"files": {}, "requested_ranges": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(
            target=http_server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        thread.start()
        yield handler, f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


DATA = np.random.default_rng(0).bytes(1_000_000)


def remote_file(address, *, name="a.bin", data=DATA):
    return download.RemoteFile(f"{address}/{name}", name, len(data), sha256(data))


def test_fetch(server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = DATA
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert download.fetch(remote_file(address), folder).read_bytes() == DATA
    assert list_files(folder) == ["a.bin"]
    assert handler.requested_ranges == [None]  # the second call downloaded nothing


@pytest.mark.parametrize(
    "accepts_ranges", [True, False], ids=["resumed", "server ignores ranges"]
)
def test_fetch_interrupted(accepts_ranges, server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = DATA
    handler.cut_after = 400_000
    handler.accepts_ranges = accepts_ranges
    with pytest.raises(download.DownloadError, match="run the command again"):
        download.fetch(remote_file(address), tmp_path)
    size = (tmp_path / "a.bin.part").stat().st_size
    assert 0 < size <= 400_000
    assert download.fetch(remote_file(address), tmp_path).read_bytes() == DATA
    assert list_files(tmp_path) == ["a.bin"]
    assert handler.requested_ranges == [None, f"bytes={size}-"]


@pytest.mark.parametrize(
    "data", [DATA[:-1] + b"?", DATA + DATA], ids=["changed", "longer"]
)
def test_fetch_wrong_checksum(data, server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = data
    message = f"sha256 expected {sha256(DATA)}, found"
    with pytest.raises(download.DownloadError, match=message):
        download.fetch(remote_file(address), tmp_path)
    assert list_files(tmp_path) == []


def test_fetch_existing_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"something else")
    with pytest.raises(download.DownloadError, match="the file was removed"):
        download.fetch(remote_file("http://127.0.0.1:9"), tmp_path)
    assert list_files(tmp_path) == []


def test_fetch_missing(server, tmp_path):
    with pytest.raises(download.DownloadError, match="404.*--source"):
        download.fetch(remote_file(server[1]), tmp_path)
    assert list_files(tmp_path) == []


def test_fetch_unreachable(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as unused:
        port = unused.server_port
    with pytest.raises(download.DownloadError, match=f"127.0.0.1:{port}.*--source"):
        download.fetch(remote_file(f"http://127.0.0.1:{port}"), tmp_path)


def test_prepare_from_the_network(server, cifar10, tmp_path):
    handler, address = server
    data = cifar10[0].read_bytes()
    handler.files["a.tar.gz"] = data
    file = remote_file(address, name="a.tar.gz", data=data)
    recipe = dataclasses.replace(cifar10[1], downloads=(file,))
    written = recipes.prepare(recipe, tmp_path / "tfds")
    builder = records.find_builder("cifar10", tmp_path / "tfds")
    assert pathlib.Path(builder.data_path) == written
    assert (tmp_path / "tfds" / "downloads" / "cifar10" / "a.tar.gz").is_file()
