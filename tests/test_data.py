"""common/data.py: the layouts of the course, the cache, and one clear line for each kind of bad data."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import data
from common.data import draw_batch, load_digits, load_folder, normalise, shuffled, split_80_20, to_uint8
from common.run import UserError
from tests.conftest import write_domain


def test_digits_are_read_in_csv_order_as_rgb(data_dir):
    images = load_digits(data_dir, "usps", "val")
    assert images.pixels.shape == (30, 3, 28, 28)
    assert images.pixels.dtype == torch.uint8
    assert images.names[0] == "00060.png"
    on_disk = np.asarray(Image.open(data_dir / "digits/usps/data/00060.png"))
    assert all(np.array_equal(channel, on_disk) for channel in images.pixels[0].numpy())  # grey repeated
    assert images.labels.tolist() == [i % 10 for i in range(60, 90)]


def test_cache_is_used_and_follows_the_content(data_dir, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_digits(data_dir, "svhn", "train", cache)
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_images", lambda *_: pytest.fail("decoded again"))
        again = load_digits(data_dir, "svhn", "train", cache)
    assert torch.equal(first.pixels, again.pixels)
    Image.new("RGB", (28, 28), (1, 2, 3)).save(data_dir / "digits/svhn/data/00000.png")
    changed = load_digits(data_dir, "svhn", "train", cache)
    assert changed.pixels[0, :, 0, 0].tolist() == [1, 2, 3]


def test_a_truncated_cache_is_made_again(data_dir, tmp_path):
    first = load_digits(data_dir, "svhn", "train", tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(load_digits(data_dir, "svhn", "train", tmp_path / "cache").pixels, first.pixels)


def test_layout_without_val_csv_is_split_80_20(tmp_path):
    write_domain(tmp_path / "digits/mnistm", {"train": 50})
    train, val = load_digits(tmp_path, "mnistm", "train"), load_digits(tmp_path, "mnistm", "val")
    assert (len(train.names), len(val.names)) == (40, 10)
    assert sorted(train.names + val.names) == [f"{i:05d}.png" for i in range(50)]
    assert val.names == [f"{i:05d}.png" for i in split_80_20(50)[1].tolist()]
    assert val.labels.tolist() == [int(name[:5]) % 10 for name in val.names]


def test_folder_of_any_size_and_format_is_resized(tmp_path):
    Image.new("L", (40, 50), 200).save(tmp_path / "b.jpg")
    Image.new("RGBA", (10, 10), (200, 200, 200, 255)).save(tmp_path / "a.PNG")
    images = load_folder(tmp_path, (28, 28))
    assert images.names == ["a.PNG", "b.jpg"]
    assert images.pixels.shape == (2, 3, 28, 28)
    assert (images.pixels.int() - 200).abs().max() <= 2  # JPEG is lossy


def test_normalise_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert normalise(every)[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(to_uint8(normalise(every)), every)


def test_processes_share_a_batch():
    """Of two processes each takes every other row of the batch that one alone would take."""
    alone, *shares = (
        draw_batch(20, 3, 6, SimpleNamespace(process_index=rank, num_processes=count, device="cpu"), 0, "x")
        for rank, count in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.equal(torch.stack(shares, 1).flatten(), alone)
    assert torch.equal(alone, shuffled(20, 18, 6, 0, "x"))


def test_shuffled_passes_see_each_image_once_wherever_one_starts():
    whole = torch.cat([shuffled(7, start, 3, 0, "x") for start in range(0, 21, 3)])
    assert [sorted(part.tolist()) for part in whole.split(7)] == [list(range(7))] * 3
    assert torch.equal(shuffled(7, 5, 11, 0, "x"), whole[5:16])
    assert not torch.equal(shuffled(7, 0, 21, 1, "x"), whole)


def break_csv(data_dir, text):
    (data_dir / "digits/svhn/val.csv").write_text(text)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: shutil.rmtree(d / "digits/svhn"), r"hw2_data: has no digit domain 'svhn'"),
        (lambda d: shutil.rmtree(d / "digits/svhn/data"), r"svhn/data: no such folder"),
        (lambda d: (d / "digits/svhn/data/00065.png").unlink(), r"val.csv: line 7: 00065.png is not in .*svhn/data"),
        (lambda d: break_csv(d, "image_name,label\n00061.png,10\n"), r"val.csv: line 2: label '10' of 00061.png"),
        (lambda d: break_csv(d, "image_name,label\n00061.png,x\n"), r"val.csv: line 2: label 'x' of 00061.png"),
        (lambda d: break_csv(d, "image_name,label\n00061.png\n"), r"val.csv: line 2 is '00061.png'"),
        (lambda d: break_csv(d, "name;label\n"), r"val.csv: line 1 is 'name;label'"),
        (lambda d: break_csv(d, "image_name,label\n"), r"val.csv: no image in it"),
    ],
)
def test_bad_data_is_named(data_dir, damage, told):
    damage(data_dir)
    with pytest.raises(UserError, match=told):
        load_digits(data_dir, "svhn", "val")


def test_a_truncated_image_is_named(data_dir):
    file = data_dir / "digits/svhn/data/00066.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"00066.png: not a whole image"):
        load_digits(data_dir, "svhn", "val")


def test_a_16_bit_image_is_refused_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep.png: is a 16-bit image"):
        load_folder(tmp_path, None)


def test_a_cache_that_cannot_be_written_is_done_without(data_dir, tmp_path):
    (tmp_path / "file").touch()
    assert len(load_digits(data_dir, "svhn", "val", tmp_path / "file" / "cache").names) == 30


def test_empty_missing_and_mixed_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere", None)
    with pytest.raises(UserError, match="no PNG or JPEG image"):
        load_folder(tmp_path, None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b.png: is 9x8, a.png is 8x8"):
        load_folder(tmp_path, None)
