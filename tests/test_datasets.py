"""Datasets: parsing, order, hashes, and what is said when files are missing or damaged."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robusteval.datasets.base import DataInfo, Split, TensorPixels, hold_out, interleave
from robusteval.datasets.open import DATASETS, open_dataset
from robusteval.errors import RobustevalError, UsageError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_fashion = pytest.mark.skipif(not (SHARED / "fashion-mnist").is_dir(), reason="no ../shared/data/fashion-mnist")
needs_jpeg = pytest.mark.skipif(
    not (SHARED / "cifar10-jpeg.tar.xz").is_file(), reason="no ../shared/data/cifar10-jpeg.tar.xz"
)

DIGITS_HASHES = {
    "train": "73141f6f17d2e995bb520a95c66e7526b46412cff02fdd7ec3a859da55b76126",
    "test": "d1994641c3d0ac7c034756a520c130e2ffeae98e2d4ec75bac5f641fbe7ab070",
}


def write_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, count: int = 12, suffix: str = "") -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10)
    return images


def png(size: tuple[int, int] = (6, 4), color: object = (10, 20, 30), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")  # type: ignore[arg-type]
    return stream.getvalue()


def write_tree(root: Path, counts: dict[str, int], mode: str = "RGB") -> Path:
    """Write ``{'test/cat': 3}``; image k of every class has the red (or grey) value k."""
    for place, count in counts.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            (root / place / f"{k:02}.png").write_bytes(png(color=(k, 0, 0) if mode == "RGB" else k, mode=mode))
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_names_are_the_files() -> None:
    assert DATASETS.names() == ["cifar10", "cifar100", "digits", "fashion_mnist", "imagefolder", "mnist", "npz", "svhn"]
    assert all(DATASETS.describe().values())


@pytest.mark.parametrize("name", DATASETS.names())
def test_every_dataset_takes_a_folder_and_says_when_it_is_empty(name: str, tmp_path: Path) -> None:
    dataset = open_dataset(name, data_dir=str(tmp_path))
    if name == "digits":
        assert len(dataset.load("test")) == 360
    else:
        with pytest.raises(RobustevalError, match=str(tmp_path)):
            dataset.load("test")


def test_a_wrong_name_is_answered_without_torch() -> None:
    program = (
        "import sys\nfrom robusteval.datasets.open import open_dataset\nfrom robusteval.errors import UsageError\n"
        "try:\n    open_dataset('cifar1O')\nexcept UsageError as error:\n    print('torch' in sys.modules, error)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.startswith("False unknown dataset 'cifar1O'. Did you mean 'cifar10'?")


@pytest.mark.parametrize(
    ("spec", "data_dir", "download", "message"),
    [
        ("digits:here", None, False, "'digits' takes no path"),
        ("imagefolder:", None, False, "names no path"),
        ("imagefolder", None, False, "needs a place"),
        ("imagefolder:a", "b", False, "two places, 'a' and 'b'"),
        ("imagefolder:a", None, True, "nothing to download"),
    ],
)
def test_requests_that_make_no_sense(spec: str, data_dir: str | None, download: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(spec, data_dir, download)


@pytest.mark.parametrize("part", ["train", "test"])
def test_digits_never_change(part: str) -> None:
    assert open_dataset("digits").load(part).content_hash == DIGITS_HASHES[part]  # type: ignore[arg-type]


def test_digits_split_is_a_stratified_partition() -> None:
    from sklearn.datasets import load_digits

    train, test = (open_dataset("digits").load(part) for part in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    together = torch.cat([train.images(slice(None)), test.images(slice(None))]).mul(16).flatten(1).int().tolist()
    assert sorted(together) == sorted(load_digits().data.astype(int).tolist())
    assert float(torch.cat([train.labels, test.labels]).bincount().sub(5 * test.labels.bincount()).abs().max()) <= 5
    for n in (20, 50, 100):
        counts = test.labels[:n].bincount(minlength=10)
        assert int((counts - n / 10).abs().max()) <= 1
    first = (train.images([0]) * 16).flatten().int().tolist()
    assert load_digits().target[load_digits().data.astype(int).tolist().index(first)] == train.labels[0]


def test_interleave_keeps_proportions_and_order() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3)
    order = interleave(labels)
    assert sorted(order.tolist()) == list(range(9))
    assert labels[order].tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert order[labels[order] == 0].tolist() == list(range(6))
    assert interleave(torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == [0, 2, 4, 1, 3, 5]


def test_hold_out_is_stratified_disjoint_and_seeded() -> None:
    labels = torch.arange(100) % 4
    info = DataInfo("t", (1, 1, 1), tuple("abcd"), (0.0,), (1.0,))
    split = Split(info, "train", TensorPixels(torch.arange(100).view(-1, 1, 1, 1).byte()), labels, torch.arange(100))
    rest, valid = hold_out(split, 20, seed=1)
    assert valid.labels.bincount().tolist() == [5, 5, 5, 5]
    assert sorted(rest.ids.tolist() + valid.ids.tolist()) == list(range(100))
    assert torch.equal(valid.images(slice(None)).flatten() * 255, valid.ids.float())
    assert torch.equal(hold_out(split, 20, seed=1)[1].ids, valid.ids)
    assert not torch.equal(hold_out(split, 20, seed=2)[1].ids, valid.ids)
    for count in (0, 100):
        with pytest.raises(UsageError, match=f"of {count} cannot"):
            hold_out(split, count, seed=1)


@pytest.mark.parametrize(("folder", "suffix"), [("", ""), ("", ".gz"), ("MNIST/raw", ""), ("mnist", ".gz")])
def test_mnist_is_found_and_read(folder: str, suffix: str, tmp_path: Path) -> None:
    images = write_mnist(tmp_path / folder, suffix=suffix)
    split = open_dataset("mnist", str(tmp_path)).load("test")
    assert split.images(slice(None)).shape == (12, 1, 28, 28)
    assert np.array_equal((split.images([3])[0, 0] * 255).round().byte().numpy(), images[3])
    assert split.labels.tolist() == [*range(10), 0, 1]
    assert split.info.benchmark is None


def test_mnist_is_looked_for_in_data_below_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("mnist").load("test")) == 12


def test_a_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "digits")
    write_tree(tmp_path / "own", {"test/a": 1, "test/b": 1})
    assert len(open_dataset("mnist", "~/digits").load("test")) == 12
    assert len(open_dataset("imagefolder:~/own").load("test")) == 2


def test_missing_files_say_where_and_how(tmp_path: Path) -> None:
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"):
        with pytest.raises(RobustevalError, match=f"was not found: looked for .*{tmp_path}.*--data-dir .*--download"):
            open_dataset(name, str(tmp_path)).load("train")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("keep", [3, 10, 100, -1])
def test_truncated_idx(suffix: str, keep: int, tmp_path: Path) -> None:
    write_mnist(tmp_path, suffix=suffix)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RobustevalError, match=r"t10k-images-idx3-ubyte.*(truncated|cannot be read)"):
        open_dataset("mnist", str(tmp_path)).load("test")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((12, 28), np.uint8), "magic number 2050, expected 2051"),
        (np.zeros((12, 28, 27), np.uint8), "items of size 12x28x27, expected 1..1000000x28x28"),
        (np.zeros((0, 28, 28), np.uint8), "items of size 0x28x28"),
        (np.zeros((11, 28, 28), np.uint8), "has 11 images but .* has 12 labels"),
    ],
)
def test_idx_headers_are_not_trusted(array: np.ndarray, message: str, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", array)
    with pytest.raises(RobustevalError, match=message):
        open_dataset("mnist", str(tmp_path)).load("test")


def test_idx_with_surplus_data_or_wrong_labels(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    write_idx(labels, np.full(12, 10, np.uint8))
    with pytest.raises(RobustevalError, match=r"label 10, allowed are 0\.\.9"):
        open_dataset("mnist", str(tmp_path)).load("test")
    labels.write_bytes(labels.read_bytes() + b"x")
    with pytest.raises(RobustevalError, match=r"announces 12 bytes .* longer"):
        open_dataset("mnist", str(tmp_path)).load("test")


def test_a_header_that_announces_too_much_is_refused_before_reading(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 2**32 - 1, 28, 28))
    with pytest.raises(RobustevalError, match="4294967295x28x28"):
        open_dataset("mnist", str(tmp_path)).load("test")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_a_modified_cifar_is_refused_and_never_unpickled(name: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    files = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta", "train", "test", "meta"]
    for file in files:
        (tmp_path / folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    for root in (tmp_path, tmp_path / folder):
        with pytest.raises(RobustevalError, match="does not have the published MD5"):
            open_dataset(name, str(root)).load("test")
    assert not (tmp_path / "boom").exists()
    pickle.loads((tmp_path / folder / "meta").read_bytes())
    assert (tmp_path / "boom").exists()


def test_a_damaged_svhn_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(RobustevalError, match=r"test_32x32\.mat' is incomplete or damaged"):
        open_dataset("svhn", str(tmp_path)).load("test")


class FakeTorchvision:
    """Stands in for a torchvision dataset, whose files are too large to make up: same arguments, same fields."""

    calls: list[dict[str, object]] = []  # noqa: RUF012

    def __init__(self, root: str, **arguments: object) -> None:
        self.calls.append({"root": root, **arguments})
        pixels = np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(np.uint8)
        self.data = pixels.transpose(0, 3, 1, 2) if "split" in arguments else pixels
        self.targets, self.classes, self.labels = [3, 1], [f"class {k}" for k in range(100)], np.array([3, 1])
        print("Files already downloaded and verified")


@pytest.mark.parametrize(
    ("name", "source", "needs", "which", "benchmark"),
    [
        ("cifar10", "CIFAR10", "cifar-10-batches-py", {"train": False}, "cifar10"),
        ("cifar100", "CIFAR100", "cifar-100-python", {"train": False}, "cifar100"),
        ("svhn", "SVHN", "test_32x32.mat", {"split": "test"}, None),
    ],
)
def test_torchvision_data_keeps_order_and_channels(
    name: str,
    source: str,
    needs: str,
    which: dict[str, object],
    benchmark: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{source}", FakeTorchvision)
    monkeypatch.setattr(FakeTorchvision, "calls", [])
    split = open_dataset(name, str(tmp_path), download=True).load("test")
    (tmp_path / needs).mkdir()
    open_dataset(name, str(tmp_path)).load("test")
    assert FakeTorchvision.calls == [{"root": str(tmp_path), "download": d, **which} for d in (True, False)]
    assert (split.images([0])[0, :, 0, 1] * 255).round().tolist() == [3, 4, 5]
    assert (split.labels.tolist(), split.info.benchmark) == ([3, 1], benchmark)
    assert split.info.num_classes == (100 if name == "cifar100" else 10)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("problem", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_is_one_sentence(problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    for source in ("CIFAR10", "FashionMNIST"):
        monkeypatch.setattr(f"torchvision.datasets.{source}", fail)
    for name in ("cifar10", "fashion_mnist"):
        with pytest.raises(RobustevalError, match=f"could not be downloaded to '{tmp_path}': {problem}"):
            open_dataset(name, str(tmp_path), download=True).load("test")


def test_mnist_is_downloaded_only_when_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(root: str, **arguments: object) -> None:
        fetched.append(arguments)
        write_mnist(Path(root) / "MNIST" / "raw")

    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    for _ in range(2):
        assert len(open_dataset("mnist", str(tmp_path), download=True).load("test")) == 12
    assert fetched == [{"download": True, "train": False}]


@pytest.mark.parametrize("folder", ["test", "val"])
def test_imagefolder_interleaves_classes(folder: str, tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{folder}/dog": 4, f"{folder}/ant": 4, f"{folder}/cat": 4})
    (tmp_path / folder / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / folder / "dog" / "._00.png").write_text("not an image")
    split = open_dataset(f"imagefolder:{tmp_path}").load("test")
    assert split.info.classes == ("ant", "cat", "dog")
    assert split.info.shape == (3, 4, 6)
    assert split.info.eps == {"Linf": "8/255"}
    assert split.info.title == tmp_path.name
    assert split.labels.tolist() == [0, 1, 2] * 4
    assert split.ids.tolist() == list(range(12))
    pixels = split.images(slice(None))
    assert (pixels[:, 0, 0, 0] * 255).round().tolist() == [k for k in range(4) for _ in range(3)]
    assert torch.equal(split.take([7, 2]).images([1]), pixels[2:3])


def test_imagefolder_grey_stays_one_channel_and_mixed_becomes_rgb(tmp_path: Path) -> None:
    write_tree(tmp_path, {"test/a": 2, "test/b": 2}, mode="L")
    grey = open_dataset("imagefolder", str(tmp_path)).load("test")
    assert grey.images(slice(None)).shape == (4, 1, 4, 6)
    assert (grey.info.shape[0], len(grey.info.mean), len(grey.info.std)) == (1, 1, 1)
    (tmp_path / "test" / "b" / "01.png").write_bytes(png(mode="RGBA", color=(1, 2, 3, 0)))
    mixed = open_dataset("imagefolder", str(tmp_path)).load("test")
    assert (mixed.images([3])[0, :, 0, 0] * 255).round().tolist() == [1, 2, 3]


def test_imagefolder_large_images_have_the_smaller_eps(tmp_path: Path) -> None:
    write_tree(tmp_path, {"test/a": 0, "test/b": 0})
    for label in "ab":
        (tmp_path / "test" / label / "0.png").write_bytes(png(size=(65, 65)))
    assert open_dataset("imagefolder", str(tmp_path)).load("test").info.eps == {"Linf": "4/255"}


def test_imagefolder_hash_sees_bytes_labels_and_order(tmp_path: Path) -> None:
    write_tree(tmp_path, {"test/a": 2, "test/b": 2})
    first = open_dataset("imagefolder", str(tmp_path)).load("test")
    assert open_dataset("imagefolder", str(tmp_path)).load("test").content_hash == first.content_hash
    assert first.take([0, 1]).content_hash != first.take([1, 0]).content_hash
    (tmp_path / "test" / "b" / "01.png").write_bytes(png(color=(9, 9, 9)))
    assert open_dataset("imagefolder", str(tmp_path)).load("test").content_hash != first.content_hash


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"test/a": 2}, "one class only, 'a'"),
        ({"test/a": 0, "test/b": 0}, "no test images"),
        ({"train/a": 1, "train/b": 1}, "no test images; they are expected in test"),
        ({"test/a": 1, "test/b": 0}, "no test image of class 'b'"),
        ({"test/a": 1, "test/b": 1, "train/a": 1, "train/c": 1}, "class 'b' in test only"),
    ],
)
def test_imagefolder_layouts_that_are_refused(counts: dict[str, int], message: str, tmp_path: Path) -> None:
    write_tree(tmp_path, counts)
    with pytest.raises(RobustevalError, match=message):
        open_dataset("imagefolder", str(tmp_path)).load("test")


def test_imagefolder_names_the_odd_size(tmp_path: Path) -> None:
    write_tree(tmp_path, {"test/a": 3, "test/b": 3})
    (tmp_path / "test" / "b" / "01.png").write_bytes(png(size=(6, 5)))
    with pytest.raises(RobustevalError, match=r"b/01\.png' is 6x5 pixels but .*a/00\.png' is 6x4"):
        open_dataset("imagefolder", str(tmp_path)).load("test")


def test_imagefolder_names_corrupted_images(tmp_path: Path) -> None:
    write_tree(tmp_path, {"test/a": 2, "test/b": 2})
    bad = tmp_path / "test" / "b" / "01.png"
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:60])
    split = open_dataset("imagefolder", str(tmp_path)).load("test")
    assert split.images([0, 1, 2]).shape == (3, 3, 4, 6)
    with pytest.raises(RobustevalError, match=r"b/01\.png' cannot be decoded"):
        split.images([3])
    bad.write_bytes(b"no image at all")
    with pytest.raises(RobustevalError, match=r"b/01\.png' cannot be decoded: it is none of BMP"):
        open_dataset("imagefolder", str(tmp_path)).load("test")


def test_imagefolder_refuses_huge_and_deep_images(tmp_path: Path) -> None:
    write_tree(tmp_path, {"test/a": 1, "test/b": 1})
    bad = tmp_path / "test" / "a" / "00.png"
    Image.new("1", (5000, 5000)).save(bad)
    with pytest.raises(RobustevalError, match=r"a/00\.png' is 5000x5000 pixels; at most"):
        open_dataset("imagefolder", str(tmp_path)).load("test")
    Image.new("I;16", (6, 4)).save(bad)
    with pytest.raises(RobustevalError, match=r"a/00\.png' has mode 'I;16', allowed are"):
        open_dataset("imagefolder", str(tmp_path)).load("test")


def test_archive_equals_its_folder(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "own", {f"{part}/{label}": 3 for part in ("train", "test") for label in "ab"})
    with tarfile.open(tmp_path / "own.tar.gz", "w:gz") as archive:
        archive.add(root, "own")
    for part in ("train", "test"):
        folder = open_dataset(f"imagefolder:{root}").load(part)
        packed = open_dataset(f"imagefolder:{tmp_path / 'own.tar.gz'}").load(part)
        assert packed.content_hash == folder.content_hash
        assert torch.equal(packed.images(slice(None)), folder.images(slice(None)))


def test_archive_takes_only_plain_images_in_place(tmp_path: Path) -> None:
    good = {f"{part}/{label}/0.png": png() for part in ("train", "test") for label in "ab"}
    odd = {f"{name}.png": png() for name in ("../test/a/1", "/test/a/1", "test/c/../a/1", "x/y/test/a/1", "test/1")}
    path = write_tar(tmp_path / "odd.tar.xz", good | odd | {"test/a/readme.txt": b"hello"})
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for name, data in good.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("test/a/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    for archive_path in (path, tmp_path / "links.tar"):
        assert len(open_dataset(f"imagefolder:{archive_path}").load("test")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["links.tar", "odd.tar.xz"]


def test_archives_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"test/{label}/0.png": png() for label in "ab"}
    whole = write_tar(tmp_path / "whole.tar.xz", members).read_bytes()
    for name, content in (("cut.tar.xz", whole[: len(whole) // 2]), ("text.tar.xz", b"hello" * 1000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RobustevalError, match=f"{name}' is not a readable tar archive"):
            open_dataset(f"imagefolder:{tmp_path / name}").load("test")
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("test/a/0.png"))
    with pytest.raises(RobustevalError, match=r"holds 'test/a/0\.png' twice"):
        open_dataset(f"imagefolder:{tmp_path / 'twice.tar'}").load("test")
    monkeypatch.setattr("robusteval.datasets._files._MAX_FILE", 10)
    with pytest.raises(RobustevalError, match=r"test/a/0\.png' is larger than"):
        open_dataset(f"imagefolder:{tmp_path / 'whole.tar.xz'}").load("test")


def test_cifar10_jpeg_copy_must_be_cifar10(tmp_path: Path) -> None:
    write_tree(tmp_path / "cifar10-jpeg", {"test/a": 1, "test/b": 1})
    with pytest.raises(RobustevalError, match=r"is not CIFAR-10: it has 2 classes \(a, b\) and 3x4x6 images"):
        open_dataset("cifar10", str(tmp_path)).load("test")


@needs_fashion
def test_the_real_fashion_mnist() -> None:
    for folder in (SHARED, SHARED / "fashion-mnist"):
        split = open_dataset("fashion_mnist", str(folder)).load("test")
        assert split.labels.bincount().tolist() == [1000] * 10
    train = open_dataset("fashion_mnist", str(SHARED)).load("train")
    pixels = train.images(slice(None))
    assert abs(float(pixels.mean()) - train.info.mean[0]) < 1e-3
    assert abs(float(pixels.std()) - train.info.std[0]) < 1e-3
    with pytest.raises(RobustevalError, match="holds Fashion-MNIST, not MNIST"):
        open_dataset("mnist", str(SHARED / "fashion-mnist")).load("test")


@needs_jpeg
@pytest.mark.slow
def test_the_real_cifar10_jpeg() -> None:
    archive = SHARED / "cifar10-jpeg.tar.xz"
    split = open_dataset("cifar10", str(SHARED)).load("test")
    assert (split.info.title, split.info.benchmark, split.info.shape) == ("CIFAR-10 (JPEG)", None, (3, 32, 32))
    assert split.info.classes[:3] == ("airplane", "automobile", "bird")
    assert split.labels[:100].bincount().tolist() == [10] * 10
    assert split.labels.bincount().tolist() == [1000] * 10
    pixels = split.images(slice(0, 1000))
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(split.info.mean), atol=0.02)
    same = open_dataset(f"imagefolder:{archive}").load("test")
    assert same.content_hash == split.content_hash
    assert same.info.title == archive.name
