"""common/data.py: the course's layouts, the cache, and one clear line for each kind of bad data."""

import os
import pickle
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import ExifTags, Image

from common import data
from common.cache import digest_of, read_cached
from common.cli import UserError
from common.data import (
    draw_batch,
    list_images,
    load_digits,
    load_folder,
    normalise,
    read_labels,
    shuffled,
    split_80_20,
    to_uint8,
)
from common.figures import save_csv
from tests.conftest import write_domain


def test_digits_are_read_in_the_order_of_the_csv_as_rgb(data_dir):
    images = load_digits(data_dir, "usps", "val")
    assert images.pixels.shape == (30, 3, 28, 28)
    assert images.pixels.dtype == torch.uint8
    assert images.names[0] == "00060.png"
    assert images.labels.tolist() == [index % 10 for index in range(60, 90)]
    on_disk = np.asarray(Image.open(data_dir / "digits/usps/data/00060.png"))
    for channel in images.pixels[0].numpy():  # grey is repeated in every channel
        assert np.array_equal(channel, on_disk)


def test_the_2024_layout_without_val_csv_is_split_80_20(tmp_path):
    write_domain(tmp_path / "digits/mnistm", {"train": 50})
    train = load_digits(tmp_path, "mnistm", "train")
    val = load_digits(tmp_path, "mnistm", "val")
    assert len(train.names) == 40
    assert len(val.names) == 10
    assert sorted(train.names + val.names) == [f"{index:05d}.png" for index in range(50)]
    _, val_rows = split_80_20(50)
    assert val.names == [f"{row:05d}.png" for row in val_rows.tolist()]
    assert val.labels.tolist() == [int(name[:5]) % 10 for name in val.names]


def test_a_folder_of_any_size_and_format_is_resized(tmp_path):
    Image.new("L", (40, 50), 200).save(tmp_path / "b.jpg")
    Image.new("RGBA", (10, 10), (200, 200, 200, 255)).save(tmp_path / "a.PNG")
    images = load_folder(tmp_path, (28, 28))
    assert images.names == ["a.PNG", "b.jpg"]
    assert images.pixels.shape == (2, 3, 28, 28)
    assert (images.pixels.int() - 200).abs().max() <= 2  # JPEG is lossy


def test_a_photo_that_is_not_square_is_cropped_in_the_middle(tmp_path):
    photo = Image.new("RGB", (64, 128), (250, 0, 0))
    photo.paste((10, 10, 10), (0, 32, 64, 96))  # the middle square
    photo.save(tmp_path / "a.png")
    images = load_folder(tmp_path, (28, 28))
    assert (images.pixels[:, :, 2:-2] == 10).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_photo_is_turned_as_its_exif_data_says(tmp_path, orientation, suffix):
    """Orientation 1 to 8 says how the stored rows and columns are meant."""
    meant = np.zeros((24, 40, 3), np.uint8)
    meant[:12, 20:] = (250, 0, 0)
    meant[12:, :20] = (0, 0, 250)
    stored = {  # what a camera stores for each, by the table of the EXIF standard
        1: meant,
        2: meant[:, ::-1],
        3: meant[::-1, ::-1],
        4: meant[::-1],
        5: meant.transpose(1, 0, 2),
        6: np.rot90(meant, 1),
        7: np.rot90(meant.transpose(1, 0, 2), 2),
        8: np.rot90(meant, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(file, exif=exif, quality=95)
    decoded = data.decode_image(file).transpose(1, 2, 0)
    assert decoded.shape == meant.shape
    places = (slice(4, None, 16), slice(8, None, 24))  # the middle of each quarter
    difference = decoded[places].astype(int) - meant[places]
    assert np.abs(difference).max() <= (0 if suffix == "png" else 8)  # JPEG is lossy


def test_damaged_exif_data_is_ignored(tmp_path):
    whole = Image.Exif()
    whole[ExifTags.Base.Orientation] = 6
    content = whole.tobytes()
    plain = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    rng = np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(content[: rng.integers(6, len(content))])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        plain.save(tmp_path / f"{number:02d}.png", exif=bytes(damaged))
    with warnings.catch_warnings(action="ignore"):  # PIL's, about the damage
        images = load_folder(tmp_path, None)
    upright = torch.from_numpy(np.asarray(plain).transpose(2, 0, 1).copy())
    turned = upright.rot90(-1, (1, 2))
    for pixels in images.pixels:
        assert torch.equal(pixels, upright) or torch.equal(pixels, turned)


def test_what_is_transparent_lies_on_white_and_that_is_said_once(tmp_path, capsys):
    """Ink that is only in the alpha channel shows; in RGB alone the image would be black."""
    ink = np.zeros((8, 8, 4), dtype=np.uint8)
    ink[2:4, :, 3] = 255
    Image.fromarray(ink).save(tmp_path / "a.png")
    hidden = Image.new("RGB", (8, 8), (10, 200, 30))
    hidden.quantize(4).save(tmp_path / "b.png", transparency=0)
    hidden.putalpha(255)
    hidden.save(tmp_path / "c.png")
    images = load_folder(tmp_path, None)
    assert (images.pixels[0, :, 2:4] == 0).all()
    assert (images.pixels[0, :, 4:] == 255).all()
    assert (images.pixels[1] == 255).all()
    assert (images.pixels[2] == torch.tensor([10, 200, 30])[:, None, None]).all()
    assert capsys.readouterr().out.count("is transparent in part, which becomes white") == 1


def test_pixels_survive_normalisation_and_back():
    every_value = torch.arange(256, dtype=torch.uint8)
    assert normalise(every_value)[[0, 255]].tolist() == [-1.0, 1.0]
    assert torch.equal(to_uint8(normalise(every_value)), every_value)


# The cache


def test_the_cache_is_used_until_a_file_changes(data_dir, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = load_digits(data_dir, "svhn", "train", cache)
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_images", lambda *_: pytest.fail("decoded a second time"))
        second = load_digits(data_dir, "svhn", "train", cache)
    assert torch.equal(first.pixels, second.pixels)
    Image.new("RGB", (28, 28), (1, 2, 3)).save(data_dir / "digits/svhn/data/00000.png")
    changed = load_digits(data_dir, "svhn", "train", cache)
    assert changed.pixels[0, :, 0, 0].tolist() == [1, 2, 3]


def test_a_truncated_cache_is_replaced(data_dir, tmp_path):
    cache = tmp_path / "cache"
    first = load_digits(data_dir, "svhn", "train", cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(load_digits(data_dir, "svhn", "train", cache).pixels, first.pixels)


def test_a_cache_with_other_content_is_replaced(data_dir, tmp_path):
    """Planted, stale or damaged: what a file says must agree with itself and with the images."""
    cache = tmp_path / "cache"
    first = load_digits(data_dir, "svhn", "train", cache).pixels
    (file,) = cache.iterdir()
    key = file.stem.split("-")[-1]
    bent = bytearray(file.read_bytes())
    bent[-5] ^= 1  # one bit of the last image but three
    one_image = first.clone()
    one_image[len(first) // 2] = 0
    for content, metadata in (
        (bytes(bent), None),
        (pickle.dumps({"content": first}), None),
        (first, {}),
        (first, {"key": key}),
        (first, {"key": key, "sha256": "0" * 64}),
        (first, {"key": "0" * 16, "sha256": digest_of(first)}),
        (first.float(), {"key": key, "sha256": digest_of(first.float())}),
        (first.char(), {"key": key, "sha256": digest_of(first)}),
        (first[:-1], {"key": key, "sha256": digest_of(first[:-1])}),
        (first[:, :1], {"key": key, "sha256": digest_of(first[:, :1])}),
        (first.flatten(), {"key": key, "sha256": digest_of(first)}),
        (torch.zeros_like(first), {"key": key, "sha256": digest_of(torch.zeros_like(first))}),
        (one_image, {"key": key, "sha256": digest_of(one_image)}),
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            tensors = {"content": content.contiguous()}
            safetensors.torch.save_file(tensors, file, metadata or None)
        assert torch.equal(load_digits(data_dir, "svhn", "train", cache).pixels, first)
        assert torch.equal(read_cached(file, key, tuple(first.shape), torch.uint8), first)


def test_a_changed_file_of_the_same_size_and_time_is_read_again(data_dir, tmp_path):
    cache = tmp_path / "cache"
    load_digits(data_dir, "svhn", "train", cache)
    file = data_dir / "digits/svhn/data/00003.png"
    before = file.stat()
    Image.new("RGB", (28, 28), (1, 2, 3)).save(file)
    with file.open("ab") as end:
        end.write(bytes(before.st_size - file.stat().st_size))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = load_digits(data_dir, "svhn", "train", cache)
    assert again.pixels[3, :, 0, 0].tolist() == [1, 2, 3]


def test_images_load_where_no_cache_can_be_written(data_dir, tmp_path):
    (tmp_path / "file").touch()
    images = load_digits(data_dir, "svhn", "val", tmp_path / "file" / "cache")
    assert len(images.names) == 30


# Batches


def test_two_processes_share_a_batch():
    """Each of two processes takes every other row of the batch that one alone would take."""

    def rows_of(rank: int, processes: int) -> torch.Tensor:
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=processes, device=torch.device("cpu")
        )
        return draw_batch(20, 3, 6, accelerator, 0, "x")

    alone = rows_of(0, processes=1)
    shared = torch.stack([rows_of(0, processes=2), rows_of(1, processes=2)], dim=1)
    assert torch.equal(shared.flatten(), alone)
    assert torch.equal(alone, shuffled(20, 18, 6, 0, "x"))


def test_each_pass_sees_every_image_once_wherever_reading_starts():
    whole = torch.cat([shuffled(7, start, 3, 0, "x") for start in range(0, 21, 3)])
    for one_pass in whole.split(7):
        assert sorted(one_pass.tolist()) == list(range(7))
    assert torch.equal(shuffled(7, 5, 11, 0, "x"), whole[5:16])
    assert not torch.equal(shuffled(7, 0, 21, 1, "x"), whole)


# Bad data


def remove_domain(svhn: Path) -> None:
    shutil.rmtree(svhn)


def remove_images(svhn: Path) -> None:
    shutil.rmtree(svhn / "data")


def remove_one_image(svhn: Path) -> None:
    (svhn / "data" / "00065.png").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_domain, r"hw2_data: has no digit domain 'svhn'"),
        (remove_images, r"svhn/data: no such folder"),
        (remove_one_image, r"val.csv: line 7: 00065.png is not in .*svhn/data"),
    ],
)
def test_a_missing_part_is_named(data_dir, damage, message):
    damage(data_dir / "digits/svhn")
    with pytest.raises(UserError, match=message):
        load_digits(data_dir, "svhn", "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_name,label\n00061.png,10\n", r"val.csv: line 2: label '10' of 00061.png"),
        ("image_name,label\n00061.png,x\n", r"val.csv: line 2: label 'x' of 00061.png"),
        ("image_name,label\n00061.png\n", r"val.csv: line 2 is '00061.png'"),
        ("name;label\n", r"val.csv: line 1 is 'name;label'"),
        ("image_name,label\n", r"val.csv: lists no image"),
    ],
)
def test_a_bad_line_of_a_csv_is_named(data_dir, text, message):
    (data_dir / "digits/svhn/val.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_digits(data_dir, "svhn", "val")


@pytest.mark.parametrize("rows", [3, 12_000])
def test_an_open_quote_is_named_by_its_line_in_a_short_message(data_dir, rows):
    text = 'image_name,label\n00060.png,1\n"00061.png,2\n' + "00062.png,3\n" * rows
    (data_dir / "digits/svhn/val.csv").write_text(text)
    with pytest.raises(
        UserError, match=r"val.csv: line 3: .*(quote opens here|quote left open)"
    ) as caught:
        load_digits(data_dir, "svhn", "val")
    assert len(str(caught.value)) < 200


def test_odd_names_of_files_are_read_and_written_as_they_are(tmp_path):
    """Commas, quotes and line breaks in names, and bytes that are no UTF-8."""
    names = ["a,b.png", 'a "b".png', "a\nb.png", os.fsdecode(b"caf\xe9.png"), " spaces .png"]
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / name, "png")
    rows = [["image_name", "label"], *([name, "7"] for name in names)]
    save_csv(rows, tmp_path / "odd.csv")
    paths, labels = read_labels(tmp_path / "odd.csv", tmp_path)
    assert [path.name for path in paths] == names
    assert labels.tolist() == [7] * len(names)


def test_a_csv_without_labels_serves_where_none_are_needed(data_dir, tmp_path):
    labelled = load_digits(data_dir, "svhn", "val")
    file = data_dir / "digits/svhn/val.csv"
    file.write_text("image_name\r\n" + "".join(f"{name}\r\n" for name in labelled.names))
    with pytest.raises(UserError, match=r"val.csv: line 1 is 'image_name', expected"):
        load_digits(data_dir, "svhn", "val")
    unlabelled = load_digits(data_dir, "svhn", "val", needs_labels=False)
    assert unlabelled.labels is None
    assert torch.equal(unlabelled.pixels, labelled.pixels)


def test_a_truncated_image_is_named(data_dir):
    file = data_dir / "digits/svhn/data/00066.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"00066.png: not a whole image"):
        load_digits(data_dir, "svhn", "val")


def test_a_16_bit_image_is_refused_and_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep.png: is a 16-bit image"):
        load_folder(tmp_path, None)
    (tmp_path / "deep.png").unlink()
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep.tif: is a floating-point image"):
        load_folder(tmp_path, None)


def test_all_usual_formats_are_read_and_the_others_counted(tmp_path, capsys):
    plain = Image.new("RGB", (8, 8), (10, 200, 30))
    names = ["a.bmp", "b.gif", "c.webp", "d.TIF", "e.tiff", "f.ppm", "g.jpeg", "h.png"]
    for name in names:
        plain.save(tmp_path / name)
    for name in ("i.heic", "j.svg", "k.heic", "list.txt"):
        (tmp_path / name).write_bytes(b"other")
    assert [path.name for path in list_images(tmp_path)] == names
    assert "3 files are left out, which cannot be read (.heic, .svg)" in capsys.readouterr().out


def test_numbered_files_are_in_natural_order(tmp_path):
    for name in ("10.png", "2.png", "1.png", "a10b2.png", "a9b10.png", "01.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    names = [path.name for path in list_images(tmp_path)]
    assert names == ["01.png", "1.png", "2.png", "10.png", "a9b10.png", "a10b2.png"]


def test_linked_folders_are_followed_but_none_is_there_twice(tmp_path):
    Image.new("L", (4, 4)).save(make(tmp_path / "real") / "1.png")
    Image.new("L", (4, 4)).save(make(tmp_path / "all" / "own") / "2.png")
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "all" / "own" / "circle").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "another").symlink_to(tmp_path / "all" / "own")
    (tmp_path / "all" / "dangling").symlink_to(tmp_path / "gone")
    found = list_images(tmp_path / "all", recursive=True)
    assert found == [tmp_path / "all/linked/1.png", tmp_path / "all/own/2.png"]


def test_many_links_to_one_another_end_soon(tmp_path):
    folders = [make(tmp_path / "all" / str(number)) for number in range(12)]
    for folder in folders:
        Image.new("L", (4, 4)).save(folder / "1.png")
        for other in folders:
            (folder / f"to {other.name}").symlink_to(other)
    assert len(list_images(tmp_path / "all", recursive=True)) == len(folders)


def test_a_transparent_photograph_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for mode in ("RGB", "RGBA"):
        Image.new(mode, (8, 4)).save(tmp_path / f"{mode}.png", exif=exif)
    assert load_folder(tmp_path, None).pixels.shape == (2, 3, 8, 4)


def test_images_one_folder_deeper_are_found(tmp_path, capsys):
    folder = tmp_path / "face" / "train"
    Image.new("L", (4, 4)).save(make(folder / "img_align_celeba") / "1.png")
    make(folder / "__MACOSX" / "img")
    assert [path.name for path in list_images(folder)] == ["1.png"]
    assert f"{folder}: its images are in {folder}/img_align_celeba" in capsys.readouterr().out
    Image.new("L", (4, 4)).save(make(folder / "other") / "1.png")
    with pytest.raises(UserError, match=r"train: contains no image itself, but 2 folders below it"):
        list_images(folder)


def test_an_image_of_another_shape_is_cut_squashed_or_padded(tmp_path, capsys):
    """A bar of red at the left and right ends of a wide image shows which."""
    wide = np.full((20, 60, 3), 255, dtype=np.uint8)
    wide[:, :10] = wide[:, 50:] = (200, 0, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    seen = {}
    for fit in ("crop", "squash", "pad"):
        seen[fit] = load_folder(tmp_path, (20, 20), None, fit).pixels[0]
    assert (seen["crop"] == 255).all()
    assert seen["squash"][:, 10, 0].tolist() == [200, 0, 0]
    assert (seen["squash"][:, 10, 8:12] == 255).all()
    assert (seen["pad"][:, 0] == 0).all()  # the border
    assert (seen["pad"][:, 10, 8:12] == 255).all()
    assert capsys.readouterr().out.count("is 60x20; its middle is cut out for 20x20") == 1


def test_each_way_to_fit_has_its_own_cache(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    load_folder(tmp_path, (4, 4), tmp_path / "cache", "crop")
    padded = load_folder(tmp_path, (4, 4), tmp_path / "cache", "pad")
    assert (padded.pixels[0, :, 0] == 0).all()


def make(folder):
    """The folder, newly made."""
    folder.mkdir(parents=True)
    return folder


def test_empty_missing_and_mixed_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere", None)
    with pytest.raises(UserError, match="contains no image"):
        load_folder(tmp_path, None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b.png: is 9x8, but a.png is 8x8"):
        load_folder(tmp_path, None)
