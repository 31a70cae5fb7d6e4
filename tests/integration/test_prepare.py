"""Preparation: fabricated archives in the true layouts, the real images through them, and a server that misbehaves."""

import contextlib
import dataclasses
import functools
import gzip
import http.server
import io
import pathlib
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.archives import (
    ARCHIVES,
    LAYOUTS,
    TRAIN,
    Evil,
    binary_archive,
    cifar_recipe,
    class_names,
    fabricate,
    idx_files,
    md5,
    members_of,
    pickle_archive,
    sha256,
    write_tar,
)

from ltkd_jax.data import datasets, records
from ltkd_jax.data.prepare import __main__ as command
from ltkd_jax.data.prepare import archives, download, recipes

DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")


def stock(name, data_dir, split):
    """The records of a split as the stock class reads them, in the order of their ids."""
    records = list(tfds.builder(name, data_dir=data_dir).as_data_source(split))
    return sorted(records, key=lambda record: record.get("id", b""))


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_stock_class_reads_what_the_archive_holds(name, archive, tmp_path):
    data = fabricate(LAYOUTS[name])
    source, layout = ARCHIVES[archive](tmp_path / "a.tar.gz", LAYOUTS[name], data)
    place = tmp_path / "tfds"
    written = recipes.prepare(cifar_recipe(name, layout), place, source)
    assert written == place / name / "3.0.2" and files_in(place)[0] == name and len(list(place.iterdir())) == 1

    builder = tfds.builder(name, data_dir=place)
    assert builder.is_prepared() and type(builder).__module__ == "tensorflow_datasets.image_classification.cifar"
    for label in layout.num_classes:
        assert builder.info.features[label].names == class_names(layout, label)
    for split, (planes, labels) in data.items():
        records = stock(name, place, split)
        assert [record["id"].decode() for record in records] == [f"{split}_{i:05d}" for i in range(len(planes))]
        for i, record in enumerate(records):
            np.testing.assert_array_equal(record["image"], planes[i].reshape(3, 32, 32).transpose(1, 2, 0))
            assert all(record[label] == values[i] for label, values in labels.items())


def test_both_layouts_give_the_same_directory(tmp_path):
    data = fabricate(LAYOUTS["cifar100"])
    for archive, make in ARCHIVES.items():
        source, layout = make(tmp_path / f"{archive}.tar.gz", LAYOUTS["cifar100"], data)
        recipes.prepare(cifar_recipe("cifar100", layout), tmp_path / archive, source)
    a, b = (tmp_path / archive / "cifar100" / "3.0.2" for archive in ARCHIVES)
    assert files_in(a) == files_in(b)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files_in(a) if "array_record" not in name)
    first, second = (tfds.builder("cifar100", data_dir=tmp_path / x).as_data_source("train") for x in ARCHIVES)
    assert [r["id"] for r in first] == [r["id"] for r in second]


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_fashion_mnist_in_a_folder_or_an_archive(form, tmp_path):
    contents = idx_files()
    gzipped = {name: gzip.compress(data) for name, data in contents.items()}
    if form == "folder":
        source = tmp_path / "files"
        source.mkdir()
        for name, data in gzipped.items():
            (source / name).write_bytes(data)
    else:
        source = write_tar(tmp_path / "a.tar.gz", {f"./{name}": data for name, data in gzipped.items()})
    digests = {name: sha256(data) for name, data in contents.items()}
    read = functools.partial(archives.read_idx, sha256=digests)
    recipes.prepare(recipes.Recipe("fashion_mnist", (), read), tmp_path / "tfds", source)
    records = stock("fashion_mnist", tmp_path / "tfds", "train")
    expected = np.frombuffer(contents["train-images-idx3-ubyte.gz"], np.uint8, offset=16).reshape(-1, 28, 28, 1)
    assert len(records) == TRAIN
    pairs = {(record["image"].tobytes(), int(record["label"])) for record in records}
    assert pairs == {(image.tobytes(), i % 10) for i, image in enumerate(expected)}


def test_real_images_through_the_binary_layout(cifar100_dir, tmp_path):
    reference = tfds.builder("cifar100", data_dir=cifar100_dir).as_data_source("test")
    records = sorted((reference[i] for i in range(60)), key=lambda record: record["id"])
    halves = {"train": records[:40], "test": records[40:]}
    data = {
        split: (
            np.stack([record["image"].transpose(2, 0, 1).reshape(3072) for record in half]),
            {name: np.array([record[name] for record in half]) for name in ("label", "coarse_label")},
        )
        for split, half in halves.items()
    }
    source, layout = binary_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar100"], data)
    recipes.prepare(cifar_recipe("cifar100", layout), tmp_path / "tfds", source)
    for split, half in halves.items():
        for mine, theirs in zip(stock("cifar100", tmp_path / "tfds", split), half, strict=True):
            np.testing.assert_array_equal(mine["image"], theirs["image"])
            assert mine["label"] == theirs["label"] and mine["coarse_label"] == theirs["coarse_label"]


@pytest.mark.slow
def test_the_whole_real_cifar100_comes_out_as_it_went_in(cifar100_dir, tmp_path):
    builder = tfds.builder("cifar100", data_dir=cifar100_dir)
    data, order = {}, {}
    for split in ("train", "test"):
        records = list(builder.as_data_source(split))
        order[split] = [record["id"] for record in records]
        records.sort(key=lambda record: record["id"])
        labels = {name: np.array([record[name] for record in records]) for name in ("label", "coarse_label")}
        data[split] = np.stack([r["image"].transpose(2, 0, 1).reshape(3072) for r in records]), labels
    source, layout = binary_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar100"], data)
    recipes.prepare(cifar_recipe("cifar100", layout), tmp_path / "tfds", source)
    again = tfds.builder("cifar100", data_dir=tmp_path / "tfds")
    for split, (planes, labels) in data.items():
        for i, record in enumerate(again.as_data_source(split)):
            assert record["id"] == order[split][i]  # the order of the records is the stock one, too
            row = int(record["id"][-5:])
            assert (record["image"].transpose(2, 0, 1).reshape(3072) == planes[row]).all()
            assert all(record[name] == values[row] for name, values in labels.items())


@pytest.mark.slow
def test_the_real_fashion_mnist(tmp_path):
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    arguments = ["fashion_mnist", "--data_dir", str(tmp_path), "--source", str(DEBIAN_FASHION_MNIST)]
    assert command.main(arguments) == 0
    source = datasets.load("fashion_mnist", tmp_path)
    assert (np.bincount(source.train.labels) == 6000).all() and (np.bincount(source.test.labels) == 1000).all()
    pixels = source.train.take(np.arange(60_000)).images / 255
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (source.mean[0], source.std[0]), atol=1e-4)


# What is refused.


def changed(members, name, data):
    return {other: data if other == name else old for other, old in members.items()}


def test_a_pickle_with_another_checksum_is_never_loaded(tmp_path):
    source, layout = pickle_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar100"], fabricate(LAYOUTS["cifar100"]))
    evil = pickle.dumps(Evil(str(tmp_path / "mark")))
    write_tar(source, changed(members_of(source), "cifar-100-python/test", evil))
    with pytest.raises(archives.ArchiveError, match=f"md5 of cifar-100-python/test expected .*, found {md5(evil)}"):
        archives.read_cifar(source, layout)
    assert not (tmp_path / "mark").exists()
    # The second line of defence: not even with the checksum does it build anything but arrays.
    layout.pickle_md5["cifar-100-python/test"] = md5(evil)
    with pytest.raises(pickle.UnpicklingError, match="mkdir is no part"):
        archives.read_cifar(source, layout)
    assert not (tmp_path / "mark").exists()


def test_labels_out_of_range_are_refused(tmp_path):
    data = fabricate(LAYOUTS["cifar100"])
    data["train"][1]["coarse_label"][3] = 20
    source, layout = binary_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar100"], data)
    with pytest.raises(ValueError, match=r"labels\[3\]=20"):
        archives.read_cifar(source, layout)


def add_link(tar):
    info = tarfile.TarInfo("cifar-100-python/train")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(info)


def add_twice(tar):
    for _ in range(2):
        info = tarfile.TarInfo("cifar-100-python/train")
        tar.addfile(info, io.BytesIO())


def add_many(tar):
    for i in range(100):
        tar.addfile(tarfile.TarInfo(f"file_{i}"), io.BytesIO())


def add_outside(tar):
    for name in ("../cifar-100-python/train", "/cifar-100-python/train", "x/cifar-100-python/train"):
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))


def add_huge(tar):
    info = tarfile.TarInfo("other")
    info.size = 5000
    tar.addfile(info, io.BytesIO(bytes(5000)))


@pytest.mark.parametrize(
    "add, message",
    [
        (add_link, "train is a link, or occurs twice"),
        (add_twice, "train is a link, or occurs twice"),
        (add_many, "more than 64 members"),
        (add_outside, "expected cifar-100-python/meta, .*found no such file"),
        (add_huge, "other has 5000 bytes, and at most 4000 are read"),
    ],
)
def test_hostile_archives_are_refused(add, message, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBER", 4000)
    monkeypatch.chdir(tmp_path)
    with tarfile.open("a.tar.gz", "w:gz") as tar:
        add(tar)
    with pytest.raises(archives.ArchiveError, match=message):
        archives.read_cifar(pathlib.Path("a.tar.gz"), LAYOUTS["cifar100"])
    assert files_in(tmp_path) == ["a.tar.gz"]


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBER", 1 << 20)
    for name in archives.FASHION_MNIST_SHA256:
        (tmp_path / name).write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(archives.ArchiveError, match="decompressed, has .* at most 1048576 are read"):
        archives.read_idx(tmp_path, archives.FASHION_MNIST_SHA256)


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_truncated_archive_is_refused(archive, cut, tmp_path):
    source, layout = ARCHIVES[archive](tmp_path / "a.tar.gz", LAYOUTS["cifar100"], fabricate(LAYOUTS["cifar100"]))
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(archives.ArchiveError, match="a.tar.gz.*official file.*sha256 expected"):
        archives.read_cifar(source, layout)


def test_one_changed_byte_of_a_binary_archive_is_refused(tmp_path):
    source, layout = binary_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar100"], fabricate(LAYOUTS["cifar100"]))
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    with pytest.raises(archives.ArchiveError, match=f"expected {layout.binary_sha256}, found {sha256(data)}"):
        archives.read_cifar(source, layout)


def test_a_changed_idx_file_is_refused(tmp_path):
    contents = idx_files()
    digests = {name: sha256(data) for name, data in contents.items()}
    contents["train-labels-idx1-ubyte.gz"] += b"x"
    for name, data in contents.items():
        (tmp_path / name).write_bytes(gzip.compress(data))
    with pytest.raises(archives.ArchiveError, match="sha256 of train-labels-idx1-ubyte.gz expected"):
        archives.read_idx(tmp_path, digests)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(archives.ArchiveError, match="train-labels-idx1-ubyte.gz is truncated or can't be read"):
        archives.read_idx(tmp_path, digests)


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    content = archives.Content({"train": (np.zeros((3, 32, 32, 3), np.uint8), {"label": np.array([0, 1, 10])})}, {})
    with pytest.raises(Exception, match="10"):
        recipes.prepare(recipes.Recipe("cifar10", (), lambda _: content), tmp_path, "any")
    assert files_in(tmp_path) == []


def test_what_is_in_the_way_is_kept(tmp_path):
    source, layout = binary_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar10"], fabricate(LAYOUTS["cifar10"]))
    mine = tmp_path / "tfds" / "cifar10" / "3.0.2" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(recipes.PrepareError, match="in the way"):
        recipes.prepare(cifar_recipe("cifar10", layout), tmp_path / "tfds", source)
    assert files_in(tmp_path / "tfds") == ["cifar10", "cifar10/3.0.2", "cifar10/3.0.2/mine.txt"]


# The command line, which knows the official checksums only.


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_the_command_refuses_what_is_not_official(name, tmp_path, capsys):
    for archive, make in ARCHIVES.items():
        source, _ = make(tmp_path / f"{archive}.tar.gz", LAYOUTS[name], fabricate(LAYOUTS[name]))
        assert command.main([name, "--data_dir", str(tmp_path / "tfds"), "--source", str(source)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
        assert "expected" in err and "official" in err
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_the_command_refuses_a_source_that_is_not_there(name, tmp_path, capsys):
    assert command.main([name, "--data_dir", str(tmp_path / "tfds"), "--source", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert files_in(tmp_path) == []


def test_the_command_says_that_it_is_done_already(tmp_path, capsys):
    source, layout = binary_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar10"], fabricate(LAYOUTS["cifar10"]))
    written = recipes.prepare(cifar_recipe("cifar10", layout), tmp_path / "tfds", source)
    assert command.main(["cifar10", "--data_dir", str(tmp_path / "tfds")]) == 0
    assert capsys.readouterr().out == f"cifar10 is already prepared: {written}\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0 and "--source PATH" in capsys.readouterr().out


def test_official_recipes():
    assert [file.name for file in recipes.recipe("cifar100").files] == ["cifar-100-binary.tar.gz"]
    assert recipes.recipe("cifar10").files[0].sha256 == recipes.recipe("cifar10").read.keywords["layout"].binary_sha256
    assert {file.name for file in recipes.recipe("fashion_mnist").files} == set(archives.FASHION_MNIST_SHA256)


# Fetching, from a server on this machine.


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; can ignore ranges, and cut an answer short once."""

    files, ranges, cut_after, seen = {}, True, None, []

    def do_GET(self):
        cls = type(self)
        cls.seen.append(self.headers.get("Range"))
        data = cls.files.get(self.path.lstrip("/"))
        if data is None:
            return self.send_error(404)
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and cls.ranges else 0
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end, cls.cut_after = cls.cut_after, None
        self.wfile.write(data[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """(handler class, address) of a server of this test's own."""
    handler = type("Own", (Handler,), {"files": {}, "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


DATA = np.random.default_rng(0).bytes(1_000_000)


def remote(address, *, name="a.bin", data=DATA):
    return download.File(f"{address}/{name}", name, len(data), sha256(data))


def test_fetch_whole(server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = DATA
    path = download.fetch(remote(address), tmp_path / "new" / "folder")
    assert path.read_bytes() == DATA and files_in(path.parent) == ["a.bin"]
    assert download.fetch(remote(address), path.parent) == path
    assert handler.seen == [None]  # the second call fetched nothing


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "server ignores ranges"])
def test_fetch_again_after_an_interruption(ranges, server, tmp_path):
    handler, address = server
    handler.files["a.bin"], handler.cut_after, handler.ranges = DATA, 400_000, ranges
    with pytest.raises(download.DownloadError, match="interrupted.*run the command again to resume"):
        download.fetch(remote(address), tmp_path)
    assert files_in(tmp_path) == ["a.bin.part"]
    received = (tmp_path / "a.bin.part").stat().st_size
    assert 0 < received <= 400_000
    assert download.fetch(remote(address), tmp_path).read_bytes() == DATA
    assert files_in(tmp_path) == ["a.bin"] and handler.seen == [None, f"bytes={received}-"]


@pytest.mark.parametrize("data", [DATA[:-1] + b"?", DATA + DATA], ids=["changed", "longer"])
def test_fetch_refuses_a_wrong_checksum(data, server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = data
    with pytest.raises(download.DownloadError, match=f"sha256 expected {sha256(DATA)}, found"):
        download.fetch(remote(address), tmp_path)
    assert files_in(tmp_path) == []


def test_fetch_verifies_what_is_there(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"something else")
    with pytest.raises(download.DownloadError, match="the file was removed"):
        download.fetch(remote("http://127.0.0.1:9"), tmp_path)
    assert files_in(tmp_path) == []


def test_fetch_starts_over_where_the_file_became_shorter(server, tmp_path):
    handler, address = server
    handler.files["a.bin"] = DATA[:1000]
    (tmp_path / "a.bin.part").write_bytes(DATA[:2000])
    with pytest.raises(download.DownloadError, match="416"):
        download.fetch(remote(address), tmp_path)
    assert files_in(tmp_path) == []


def test_fetch_of_a_missing_file(server, tmp_path):
    with pytest.raises(download.DownloadError, match="404.*--source"):
        download.fetch(remote(server[1]), tmp_path)
    assert files_in(tmp_path) == []


@contextlib.contextmanager
def closed_port():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as unused:
        port = unused.server_port
    yield port


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_fetch_from_an_unreachable_host_is_quick(host, tmp_path):
    with closed_port() as port:
        start = time.perf_counter()
        with pytest.raises(download.DownloadError, match="can't be reached.*--source"):
            download.fetch(remote(f"http://{host}:{port}"), tmp_path)
        assert time.perf_counter() - start < 5


def test_prepare_from_the_network(server, tmp_path):
    handler, address = server
    source, layout = binary_archive(tmp_path / "a.tar.gz", LAYOUTS["cifar10"], fabricate(LAYOUTS["cifar10"]))
    handler.files["a.tar.gz"] = source.read_bytes()
    file = remote(address, name="a.tar.gz", data=source.read_bytes())
    how = dataclasses.replace(cifar_recipe("cifar10", layout), files=(file,))
    written = recipes.prepare(how, tmp_path / "tfds")
    assert pathlib.Path(records.find_builder("cifar10", tmp_path / "tfds").data_path) == written
    assert (tmp_path / "tfds" / "downloads" / "cifar10" / "a.tar.gz").is_file()
