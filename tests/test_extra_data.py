"""Generated images as a dataset, and training batches that mix them with the original ones."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robusteval.datasets.base import DataInfo, Split, TensorPixels
from robusteval.datasets.open import open_dataset
from robusteval.errors import RobustevalError, UsageError
from robusteval.training.extra import extra_rows, join, mixed_batches

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
LABELS = np.arange(12) % 4


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def opened(path: Path) -> Split:
    return open_dataset(f"npz:{path}").load("train")


@pytest.fixture
def extra(tmp_path: Path) -> Split:
    return opened(write(tmp_path / "generated.npz", image=IMAGES, label=LABELS))


def test_grey_images_are_read_in_file_order(extra: Split) -> None:
    assert extra.info.title == "generated.npz"
    assert extra.info.shape == (1, 8, 8)
    assert extra.info.classes == ("0", "1", "2", "3")
    assert extra.labels.tolist() == LABELS.tolist()
    assert extra.ids.tolist() == list(range(12))
    assert torch.equal(extra.images([3, 1])[:, 0], torch.from_numpy(IMAGES[[3, 1]]).float() / 255)


def test_colour_images_compressed_and_by_data_dir(tmp_path: Path) -> None:
    colour = np.random.default_rng(1).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "c.npz", image=colour, label=np.array([0, 1, 2, 1, 0], np.uint8))
    split = open_dataset("npz", str(tmp_path / "c.npz")).load("train")
    assert split.info.shape == (3, 6, 7)
    assert torch.equal(split.images([4])[0], torch.from_numpy(colour[4]).permute(2, 0, 1).float() / 255)
    assert len(split.content_hash) == 64


def test_there_is_no_test_part(tmp_path: Path) -> None:
    path = write(tmp_path / "g.npz", image=IMAGES, label=LABELS)
    with pytest.raises(UsageError, match="holds training images only, so there is no test part"):
        open_dataset(f"npz:{path}").load("test")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": IMAGES}, "has no array 'label'; it holds image"),
        ({"images": IMAGES, "label": LABELS}, "has no array 'image'; it holds images, label"),
        ({"image": IMAGES.astype(np.float32), "label": LABELS}, "'image' is float32 of shape"),
        ({"image": IMAGES[:, None], "label": LABELS}, r"'image' is uint8 of shape \(12, 1, 8, 8\)"),
        ({"image": IMAGES[0], "label": LABELS[:8]}, r"'image' is uint8 of shape \(8, 8\)"),
        ({"image": IMAGES[:0], "label": LABELS[:0]}, r"'image' is uint8 of shape \(0, 8, 8, 1\)"),
        ({"image": IMAGES, "label": LABELS[:5]}, r"'label' is int64 of shape \(5,\); it must be 12 integers"),
        ({"image": IMAGES, "label": LABELS[:, None]}, r"'label' is int64 of shape \(12, 1\)"),
        ({"image": IMAGES, "label": LABELS.astype(float)}, "'label' is float64"),
        ({"image": IMAGES, "label": LABELS - 1}, "labels reach from -1 to 2"),
        ({"image": IMAGES, "label": LABELS * 0}, "labels reach from 0 to 0"),
        ({"image": IMAGES, "label": LABELS + 10**12}, "labels reach from 1000000000000 to"),
        ({"image": IMAGES, "label": np.array([None] * 12)}, "damaged or not an .npz archive of arrays"),
    ],
)
def test_arrays_that_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RobustevalError, match=message) as caught:
        opened(write(tmp_path / "g.npz", **arrays))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    return data[:300] + bytes([data[300] ^ 1]) + data[301:]


def _huge(data: bytes) -> bytes:
    return data.replace(b"(12, 8, 8), }", b"(12, 8e8), }").replace(b"(12, 8, 8)", b"(99999999999, 8, 8)")


def _no_array(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image", "hello")
        archive.writestr("label", "world")
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [_cut, _flipped, _huge, _no_array, lambda _: b"", lambda _: b"\x80\x04pickle"])
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write(tmp_path / "g.npz", image=IMAGES, label=LABELS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RobustevalError, match=r"g\.npz") as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_path(tmp_path: Path) -> None:
    with pytest.raises(RobustevalError, match="there is no file"):
        opened(tmp_path / "absent.npz")
    with pytest.raises(UsageError, match="write npz:PATH"):
        open_dataset("npz:")
    with pytest.raises(UsageError, match="nothing to download"):
        open_dataset("npz:a", download=True)


def test_join_reads_both_and_moves_the_ids(extra: Split) -> None:
    base = open_dataset("digits").load("train")
    whole = join(base.take([5, 3]), extra.take([7, 2]), population=2000)
    assert whole.ids.tolist() == [5, 3, 2007, 2002]
    assert whole.labels.tolist() == [*base.labels[[5, 3]].tolist(), *extra.labels[[7, 2]].tolist()]
    assert whole.info is base.info
    expected = torch.cat([base.images([5, 3]), extra.images([7, 2])])
    assert torch.equal(whole.images(slice(None)), expected)
    assert torch.equal(whole.images([3, 0, 2]), expected[[3, 0, 2]])
    assert torch.equal(whole.images([1]), expected[[1]])
    assert torch.equal(whole.take([2, 1]).images([0]), expected[[2]])
    assert len({whole.content_hash, whole.take([0, 1, 3, 2]).content_hash, base.content_hash}) == 3


def test_extra_data_that_does_not_fit(extra: Split, tmp_path: Path) -> None:
    digits = open_dataset("digits").load("train")
    colour = opened(write(tmp_path / "c.npz", image=IMAGES.repeat(3).reshape(12, 8, 8, 3), label=LABELS))
    with pytest.raises(UsageError, match=r"c\.npz' has 3x8x8 images, but Digits has 1x8x8 ones"):
        join(digits, colour, 2000)
    many = opened(write(tmp_path / "m.npz", image=IMAGES, label=LABELS + 8))
    with pytest.raises(UsageError, match="has label 11, but Digits has 10 classes, 0 to 9"):
        join(digits, many, 2000)
    with pytest.raises(ValueError, match="population 3 is not above"):
        join(digits, extra, 3)


@given(
    base=st.integers(1, 60),
    extra=st.integers(1, 60),
    batch_size=st.integers(2, 40),
    fraction=st.floats(0.05, 0.95),
    steps=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_each_kind_runs_through_all_its_samples_before_one_repeats(
    base: int, extra: int, batch_size: int, fraction: float, steps: int, seed: int
) -> None:
    added = round(batch_size * fraction)
    if not 0 < added < batch_size:
        with pytest.raises(UsageError, match=r"extra\.fraction"):
            mixed_batches(base, extra, batch_size, fraction, steps, seed, 0)
        return
    epochs = [list(mixed_batches(base, extra, batch_size, fraction, steps, seed, epoch)) for epoch in range(3)]
    again = list(mixed_batches(base, extra, batch_size, fraction, steps, seed, 1))
    assert all(torch.equal(one, two) for one, two in zip(epochs[1], again, strict=True))
    batches = [batch for epoch in epochs for batch in epoch]
    assert len(batches) == 3 * steps
    assert all(len(batch) == batch_size and int((batch >= base).sum()) == added for batch in batches)
    rows = torch.cat(batches)
    for stream, length in ((rows[rows < base], base), (rows[rows >= base] - base, extra)):
        whole = len(stream) // length
        counts = stream.bincount(minlength=length)
        assert len(counts) == length
        assert set(counts.tolist()) <= {whole, whole + 1}


def test_consecutive_parts_of_a_batch_have_their_share_of_extra_rows() -> None:
    batch = next(mixed_batches(100, 100, 12, 0.25, 1, 0, 0))
    assert extra_rows(12, 0.25) == 3
    assert [int((part >= 100).sum()) for part in batch.tensor_split(3)] == [1, 1, 1]


def test_a_fresh_order_comes_with_every_pass() -> None:
    one, two = (torch.cat(list(mixed_batches(8, 8, 4, 0.5, 4, 0, epoch))) for epoch in (0, 1))
    assert sorted(one.tolist()) == sorted(two.tolist())
    assert one.tolist() != two.tolist()


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    def split(*classes: str) -> Split:
        info = DataInfo("pets", (1, 2, 2), classes, (0.5,), (0.5,))
        count = len(classes)
        return Split(info, "train", TensorPixels(torch.rand(count, 1, 2, 2)), torch.arange(count), torch.arange(count))

    base = split("airplane", "bird", "cat", "dog")
    assert join(base, split("cat", "dog"), 4).labels.tolist() == [0, 1, 2, 3, 2, 3]
    assert join(base, split("0", "1"), 4).labels.tolist() == [0, 1, 2, 3, 0, 1]
    with pytest.raises(UsageError, match=r"has class 'dgo', which pets has not\. Did you mean 'dog'"):
        join(base, split("cat", "dgo"), 4)
