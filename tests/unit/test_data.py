"""Images from files: what is read, in which form, and what is refused in one sentence."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.data import open_images, write
from besiege.data.parquet import column
from besiege.data.picture import BadPicture, decode
from besiege.data.wanted import fit


def pixels(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def folder_of(root, classes, per_class=2, size=(6, 5)):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(pixels(100 * k + i, *size, 3)).save(root / name / f"{i}.png")
    return root


def refused(*args, **kwargs):
    with pytest.raises(BadInput) as caught:
        open_images(*args, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence
    return sentence


# the embedded default, limits, seeds


def test_the_default_is_the_embedded_digits():
    images = open_images()
    assert images.name == "embedded:digits"
    assert images.shape == (1, 28, 28)
    assert images.names == tuple("0123456789")


def test_a_larger_limit_takes_the_same_images_and_more():
    few, more, other = (
        open_images(limit=20),
        open_images(limit=60),
        open_images(limit=20, seed=1),
    )
    whole = open_images()
    assert set(few.index.tolist()) < set(more.index.tolist())
    assert few.index.tolist() != other.index.tolist()
    assert few.index.tolist() == sorted(few.index.tolist())
    assert torch.equal(few.x, whole.x[few.index]) and torch.equal(few.y, whole.y[few.index])


def test_unknown_specs_suggest_the_nearest():
    assert "'digits'" in refused("embedded:digit")
    assert "'imagefolder'" in refused("imagefolders:/nowhere")
    assert "no such" in refused("/nowhere")
    assert "at least 1" in refused(limit=0)
    assert "channels" in refused(channels=2)
    assert "skip" in refused(on_bad="ignore")


def test_size_and_channels_are_brought_about():
    plain = open_images(limit=5)
    shaped = open_images(limit=5, size=(14, 20), channels=3)
    assert shaped.shape == (3, 14, 20)
    assert torch.equal(shaped.x[:, 0], shaped.x[:, 2])
    expected = F.interpolate(plain.x, (14, 20), mode="bilinear", antialias=True).clamp(0, 1)
    assert torch.allclose(shaped.x[:, :1], expected, atol=1e-6)


def test_fit_keeps_luma_and_drops_or_adds_alpha():
    x = torch.rand(2, 3, 4, 4)
    grey = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    assert torch.allclose(fit(x, None, 1)[:, 0], grey)
    four = fit(x, None, 4)
    assert torch.equal(four[:, :3], x) and bool((four[:, 3] == 1).all())
    assert torch.equal(fit(four, None, 3), x)
    assert fit(x[:, :1], None, 4).shape == (2, 4, 4, 4)


# npz


@pytest.mark.parametrize(("keys", "channels"), [(("x", "y"), 3), (("images", "labels"), 1), (("X", "y_test"), 4)])
def test_npz_channels_last_and_first_are_the_same(tmp_path, keys, channels):
    x, y = pixels(0, 7, 9, 8, channels), np.arange(7, dtype=np.uint8)
    np.savez(tmp_path / "last.npz", **{keys[0]: x, keys[1]: y})
    np.savez_compressed(tmp_path / "first.npz", **{keys[0]: x.transpose(0, 3, 1, 2), keys[1]: y[:, None]})
    last, first = open_images(str(tmp_path / "last.npz")), open_images(f"npz:{tmp_path / 'first.npz'}")
    assert last.shape == (channels, 9, 8)
    assert torch.equal(last.x, first.x) and torch.equal(last.y, first.y)
    assert torch.allclose(last.x, torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255)


def test_npz_of_grey_images_16_bits_and_floats(tmp_path):
    x, y = pixels(0, 3, 5, 6), np.arange(3)
    np.savez(tmp_path / "grey.npz", x=x, y=y)
    np.savez(tmp_path / "deep.npz", x=x.astype(np.uint16) * 257, y=y)
    np.savez(tmp_path / "float.npz", x=x / 255.0, y=y)
    read = [open_images(str(tmp_path / f"{name}.npz")) for name in ("grey", "deep", "float")]
    assert all(images.shape == (1, 5, 6) and images.x.dtype == torch.float32 for images in read)
    assert all(torch.allclose(images.x, read[0].x, atol=1e-7) for images in read)


def test_npz_refusals(tmp_path):
    path = tmp_path / "a.npz"

    def with_arrays(**arrays):
        np.savez(path, **arrays)
        return refused(str(path))

    x, y = pixels(0, 4, 8, 8), np.arange(4)
    assert "one label an image" in with_arrays(x=x, y=y[:3])
    assert "no labels" in with_arrays(x=x)
    assert "no images" in with_arrays(y=y, foo=x)
    assert "shape" in with_arrays(x=x[0, 0], y=y)
    assert "channels" in with_arrays(x=pixels(0, 4, 8, 8, 2), y=y)
    assert "whole numbers" in with_arrays(x=x, y=y / 2)
    assert "from 0" in with_arrays(x=x, y=y - 1)
    assert "[0, 1]" in with_arrays(x=x.astype(float), y=y)
    assert "[0, 1]" in with_arrays(x=np.full((4, 8, 8), np.nan), y=y)
    assert "0 to 255" in with_arrays(x=x.astype(int) + 200, y=y)
    assert "there are no images" in with_arrays(x=x[:0], y=y[:0])
    np.savez(path, x=x, y=y)
    path.write_bytes(path.read_bytes()[:150])
    assert "truncated" in refused(str(path))
    path.write_bytes(b"not an archive")
    assert "truncated" in refused(str(path))
    assert "no such file" in refused(f"npz:{tmp_path / 'nothing.npz'}")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_npz_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Bomb(tmp_path / "ran")], dtype=object), y=np.arange(1))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert "run code" in refused(str(tmp_path / "a.npz"))
    refused(str(tmp_path / "b.npz"))
    assert not (tmp_path / "ran").exists()


# idx


def idx(array):
    kind = {1: 8, 4: 12}[array.dtype.itemsize]
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_idx_plain_and_gzipped_with_the_test_part_first(tmp_path):
    x, y = pixels(0, 5, 4, 3), np.arange(5, dtype=np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(x[::-1].copy()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(y[::-1].copy()))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y)))
    for spec in (f"idx:{tmp_path}", str(tmp_path), str(tmp_path / "t10k-images-idx3-ubyte.gz")):
        images = open_images(spec)
        assert torch.equal(images.x, torch.from_numpy(x)[:, None].float() / 255)
        assert images.y.tolist() == y.tolist()
    assert open_images(str(tmp_path / "train-images-idx3-ubyte")).y.tolist() == [4, 3, 2, 1, 0]


def test_idx_refusals(tmp_path):
    images, labels = tmp_path / "a-images-idx3-ubyte", tmp_path / "a-labels-idx1-ubyte"
    x, y = pixels(0, 5, 4, 3), np.arange(5, dtype=np.uint8)
    images.write_bytes(idx(x))
    assert "label file" in refused(str(images))
    labels.write_bytes(idx(y[:4]))
    assert "5 images" in refused(str(images))
    labels.write_bytes(idx(y))
    for bad in (idx(x)[:-1], idx(x)[:6], b"", b"PNG and more", gzip.compress(idx(x))[:-9]):
        images.write_bytes(bad)
        assert str(images) in refused(str(images))
    images.write_bytes(idx(y))
    assert "8-bit images" in refused(str(images))
    assert "no idx images" in refused(f"idx:{tmp_path / '..' / tmp_path.name / '..'}")


# pictures


def test_camera_rotation_is_applied(tmp_path):
    array = pixels(0, 4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.rot90(array, -1).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(decode(tmp_path / "turned.png"), expected)


def test_16_bit_grey_is_not_saturated(tmp_path):
    array = np.array([[0, 255, 256], [1000, 40000, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(array).save(tmp_path / name)
        assert torch.allclose(decode(tmp_path / name)[0], torch.from_numpy(array.astype(np.float32)) / 65535)
    assert decode(tmp_path / "deep.png", alpha=True).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [("1", "png", 1), ("L", "png", 1), ("LA", "png", 1), ("P", "png", 3), ("RGB", "bmp", 3), ("RGBA", "png", 3),
     ("CMYK", "tif", 3), ("YCbCr", "jpg", 3), ("P", "gif", 3)],
)  # fmt: skip
def test_every_mode_is_read_as_its_picture_shows(tmp_path, mode, suffix, channels):
    grey = channels == 1
    smooth = np.linspace(0, 255, 8 * 8).reshape(8, 8).astype(np.uint8)
    picture = Image.fromarray(smooth if grey else np.stack([smooth, smooth.T, 255 - smooth], -1))
    if mode.endswith("A"):
        picture.putalpha(0)
    else:
        picture = picture.convert(mode)
    path = tmp_path / f"a.{suffix}"
    picture.save(path)
    read = decode(path)
    with Image.open(path) as file:
        shown = np.asarray(file.convert("L" if grey else "RGB"), np.float32).reshape(8, 8, -1) / 255
    assert read.shape == (channels, 8, 8)
    assert np.allclose(read.permute(1, 2, 0).numpy(), shown)
    if mode in ("LA", "RGBA"):  # what lies under full transparency is kept
        assert np.allclose(read[0].numpy(), smooth / 255, atol=1e-6)


def test_alpha_is_kept_where_four_channels_are_wanted(tmp_path):
    folder_of(tmp_path, ["0", "1"])
    picture = Image.fromarray(pixels(1, 6, 5, 4))
    picture.save(tmp_path / "1" / "0.png")
    images = open_images(str(tmp_path), channels=4)
    assert images.shape == (4, 6, 5)
    assert np.array_equal((images.x[2] * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(picture))
    assert bool((images.x[0, 3] == 1).all())


def test_bad_pictures_say_why(tmp_path):
    Image.fromarray(pixels(0, 40, 40, 3)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.array([[0.5, 7.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    for name, reason in (
        ("cut.png", "damaged"),
        ("text.png", "no picture"),
        ("none.png", "missing"),
        ("float.tif", "outside"),
    ):
        with pytest.raises(BadPicture, match=reason):
            decode(tmp_path / name)


# folders


def test_a_missing_class_folder_shifts_no_label(tmp_path):
    folder_of(tmp_path / "a", ["1", "2", "10"])
    assert sorted(set(open_images(str(tmp_path / "a")).y.tolist())) == [1, 2, 10]
    folder_of(tmp_path / "b", ["cat", "eel"])
    (tmp_path / "b" / "classes.txt").write_text("ant\ncat\ndog\n\neel\n")
    images = open_images(f"imagefolder:{tmp_path / 'b'}")
    assert images.y.tolist() == [1, 1, 3, 3]
    assert images.names == ["ant", "cat", "dog", "eel"]
    assert images.notes == ()


@pytest.mark.parametrize(
    "content", [["ant", "cat", "dog", "eel"], {"cat": 1, "eel": 3}, {"0": "ant", "1": "cat", "3": "eel"}]
)
def test_labels_json_in_its_three_forms(tmp_path, content):
    folder_of(tmp_path, ["cat", "eel"])
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert open_images(str(tmp_path)).y.tolist() == [1, 1, 3, 3]


def test_names_of_the_classifier_give_the_labels(tmp_path):
    folder_of(tmp_path, ["cat", "eel"])
    assert open_images(str(tmp_path), names=["eel", "ant", "cat"]).y.tolist() == [2, 2, 0, 0]
    assert "eel" in refused(str(tmp_path), names=["ant", "cat"])


def test_alphabetical_labels_are_said(tmp_path):
    images = open_images(str(folder_of(tmp_path, ["cat", "ant"])))
    assert images.y.tolist() == [0, 0, 1, 1]
    assert images.names == ["ant", "cat"]
    assert "alphabetical" in images.notes[0]


def test_bad_files_are_named_counted_and_refused_or_skipped(tmp_path):
    folder_of(tmp_path, ["0", "1"], per_class=10)
    for i in range(7):
        (tmp_path / "0" / f"{i}.png").write_bytes(b"rubbish")
    (tmp_path / "0" / ".DS_Store").write_bytes(b"hidden")
    sentence = refused(str(tmp_path))
    assert "7 of 20 files" in sentence and "0.png" in sentence and "and 2 more" in sentence
    images = open_images(str(tmp_path), on_bad="skip")
    assert len(images) == 13
    assert images.index.tolist() == list(range(7, 20))
    assert any("skipped: 7 of 20" in note for note in images.notes)
    assert len(open_images(str(tmp_path), on_bad="skip", limit=12)) == 12
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"rubbish")
    assert "no picture is left" in refused(str(tmp_path), on_bad="skip")


def test_maps_of_regions_lie_beside_the_pictures_or_in_the_archive(tmp_path):
    """Numbers as they stand, of grey files and of palettes; scaled to the nearest; the rows that were drawn."""
    root, maps = folder_of(tmp_path / "f", ["a", "b"]), pixels(5, 4, 6, 5) % 9
    for k, path in enumerate(sorted(root.rglob("*.png"))):
        grey = Image.fromarray(maps[k])
        (grey if k % 2 else palette(grey)).save(path.with_name(f"{path.stem}.map.png"))
    read = open_images(f"imagefolder:{root}")
    assert read.maps.tolist() == maps.tolist()
    assert read[torch.tensor([2])].maps.tolist() == maps[2:3].tolist()
    np.savez(tmp_path / "a.npz", x=pixels(6, 4, 6, 5, 3), y=np.arange(4), maps=maps)
    drawn = open_images(str(tmp_path / "a.npz"), limit=2)
    assert drawn.maps.tolist() == maps[drawn.index.numpy()].tolist()
    for spec in (str(root), str(tmp_path / "a.npz")):
        assert open_images(spec, size=(12, 10)).maps.tolist() == maps.repeat(2, 1).repeat(2, 2).tolist()
    assert open_images(f"imagefolder:{folder_of(tmp_path / 'g', ['a'])}").maps is None


def palette(grey):
    picture = Image.fromarray(np.asarray(grey), "P")
    picture.putpalette([255 - k // 3 for k in range(768)])
    return picture


def test_maps_that_are_none_are_refused(tmp_path):
    root = folder_of(tmp_path / "f", ["a"])
    Image.fromarray(pixels(0, 6, 5)).save(root / "a" / "0.map.png")
    assert "1.map.png is missing" in refused(str(root))
    Image.fromarray(pixels(0, 6, 5, 3)).save(root / "a" / "1.map.png")
    assert "1.map.png is of mode RGB" in refused(str(root))
    Image.fromarray(pixels(0, 6, 4)).save(root / "a" / "1.map.png")
    assert "different sizes" in refused(str(root))
    Image.fromarray(pixels(0, 6, 4)).save(root / "a" / "0.map.png")
    assert "the maps are (2, 6, 4), the images (2, 6, 5)" in refused(str(root))
    for wrong in (pixels(0, 2, 6, 4), pixels(0, 2, 6, 5) / 1.0):
        np.savez(tmp_path / "a.npz", x=pixels(6, 2, 6, 5, 3), y=np.arange(2), maps=wrong)
        assert "maps must be whole numbers of shape (2, 6, 5)" in refused(str(tmp_path / "a.npz"))


def test_different_sizes_need_one(tmp_path):
    folder_of(tmp_path, ["0", "1"])
    Image.fromarray(pixels(9, 30, 20, 3)).save(tmp_path / "1" / "1.png")
    sentence = refused(str(tmp_path))
    assert "6x5" in sentence and "30x20" in sentence
    images = open_images(str(tmp_path), size=(12, 10))
    assert images.shape == (3, 12, 10)


def test_scaling_down_is_antialiased(tmp_path):
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    (tmp_path / "0").mkdir()
    Image.fromarray(checks).save(tmp_path / "0" / "a.png")
    x = open_images(str(tmp_path), size=(8, 8)).x
    assert float((x - 0.5).abs().max()) < 0.02


def test_grey_among_coloured_becomes_colour(tmp_path):
    folder_of(tmp_path, ["0", "1"])
    Image.fromarray(pixels(3, 6, 5)).save(tmp_path / "1" / "0.png")
    images = open_images(str(tmp_path))
    assert images.shape == (3, 6, 5)
    assert torch.equal(images.x[2, 0], images.x[2, 2])
    assert images.notes


def test_folder_refusals(tmp_path):
    assert "no folders" in refused(f"imagefolder:{tmp_path}")
    assert "no such folder" in refused(f"imagefolder:{tmp_path / 'x'}")
    (tmp_path / "0").mkdir()
    assert "no pictures" in refused(str(tmp_path))
    (tmp_path / "labels.json").write_text("{")
    assert "JSON" in refused(str(tmp_path))
    (tmp_path / "labels.json").write_text("3")
    assert "labels.json" in refused(str(tmp_path))


# csv


def test_csv_with_numbers_and_with_names(tmp_path):
    folder_of(tmp_path / "pictures", ["a"], per_class=3)
    table = tmp_path / "labels.csv"
    table.write_text("label,file\n7,pictures/a/0.png\n2,pictures/a/2.png\n")
    images = open_images(f"csv:{tmp_path}")
    assert images.y.tolist() == [7, 2]
    assert torch.equal(images.x[1], decode(tmp_path / "pictures/a/2.png"))
    table.write_text("filename,class\npictures/a/0.png,eel\npictures/a/1.png,ant\n")
    assert open_images(str(tmp_path)).y.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("ant\ncat\neel")
    assert open_images(str(table)).y.tolist() == [2, 0]


def test_csv_refusals(tmp_path):
    folder_of(tmp_path / "pictures", ["a"], per_class=3)
    table = tmp_path / "labels.csv"
    assert "no such file" in refused(f"csv:{tmp_path}")

    def with_text(text):
        table.write_text(text)
        return refused(str(table))

    assert "no column 'label'" in with_text("file,foo\npictures/a/0.png,1\n")
    assert "no column" in with_text("")
    assert "line 3" in with_text("file,label\npictures/a/0.png,1\npictures/a/1.png,\n")
    assert "gone.png (missing)" in with_text("file,label\npictures/a/0.png,1\ngone.png,1\n")
    assert "from 0" in with_text("file,label\npictures/a/0.png,-1\npictures/a/1.png,0\n")
    assert "no pictures" in with_text("file,label\n")
    table.write_bytes(b"\xff\xfe\x00")
    assert "unreadable" in refused(str(table))


# parquet


def parquet_of(path, contents, labels, kind=None, names=None):
    """Pictures as Hugging Face's files hold them, in a struct, or plain."""
    column = contents if kind == "plain" else [{"bytes": part, "path": None} for part in contents]
    told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"image": column, "label": labels})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(told)} if names else None), path)
    return path


def pngs(tmp_path, n=3):
    folder_of(tmp_path / "pictures", ["a"], per_class=n)
    return [(tmp_path / f"pictures/a/{i}.png").read_bytes() for i in range(n)]


@pytest.mark.parametrize("kind", ["plain", "struct"])
def test_parquet_with_numbers_and_with_names(tmp_path, kind):
    contents = pngs(tmp_path)
    file = parquet_of(tmp_path / "train-0.parquet", contents, [7, 2, 7], kind)
    images = open_images(str(file))
    assert (images.y.tolist(), images.names) == ([7, 2, 7], None)
    assert torch.equal(images.x[1], decode(tmp_path / "pictures/a/1.png"))
    parquet_of(file, contents, ["eel", "ant", "eel"], kind)
    assert open_images(f"parquet:{file}").y.tolist() == [1, 0, 1]
    assert open_images(str(file), names=["eel", "bat", "ant"]).y.tolist() == [0, 2, 0]
    parquet_of(tmp_path / "train-1.parquet", contents[:1], ["ant"], kind)
    assert open_images(str(tmp_path), limit=3).index.tolist() != [0, 1, 2, 3]
    assert open_images(str(tmp_path)).y.tolist() == [1, 0, 1, 0]


def test_parquet_names_its_classes(tmp_path):
    file = parquet_of(tmp_path / "a.parquet", pngs(tmp_path), [0, 1, 0], names=["eel", "ant"])
    images = open_images(str(file))
    assert (images.y.tolist(), list(images.names)) == ([0, 1, 0], ["eel", "ant"])
    assert open_images(str(file), names=["ant", "bat", "eel"]).y.tolist() == [2, 0, 2]
    assert "not in the names given" in refused(str(file), names=["ant", "bat"])
    parquet_of(file, pngs(tmp_path / "b"), [0, 1, 2], names=["eel", "ant"])
    assert "label 2 is none of the 2 classes" in refused(str(file))


def test_parquet_that_was_written_reads_back_as_it_was(tmp_path):
    x = torch.from_numpy(pixels(0, 4, 3, 6, 5)) / 255
    images = Images.of(x, torch.tensor([1, 0, 2, 1]), name="few", names=["ant", "bat", "cow"])
    file, truth = tmp_path / "few.parquet", torch.tensor([False, True, False, True])
    file.write_bytes(write.parquet(images, truth=truth))
    again = open_images(str(file))
    assert torch.equal(again.x, images.x) and torch.equal(again.y, images.y)
    assert list(again.names) == ["ant", "bat", "cow"]
    assert column(file, "truth") == truth.tolist() and column(file, "lies") is None
    features = json.loads(parquet.read_schema(file).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["ant", "bat", "cow"], "_type": "ClassLabel"}
    assert features["truth"] == {"dtype": "bool", "_type": "Value"}


def test_parquet_refusals(tmp_path):
    contents, file = pngs(tmp_path), tmp_path / "a.parquet"
    assert "no such file" in refused(str(file))
    assert "no .parquet file" in refused(f"parquet:{tmp_path}")
    file.write_bytes(b"PAR1 no")
    assert "no Parquet file" in refused(str(file))
    parquet.write_table(pa.table({"image": contents, "lable": [0, 1, 2]}), file)
    assert "no column 'label', only image, lable" in refused(str(file))
    parquet.write_table(pa.table({"image": ["a", "b"], "label": [0, 1]}), file)
    assert "encoded pictures, not string" in refused(str(file))
    parquet.write_table(pa.table({"image": contents, "label": [0.5, 1, 2]}), file)
    assert "whole numbers or names of classes, not double" in refused(str(file))
    assert "1 rows lack a label, the first is row 1" in refused(str(parquet_of(file, contents, [0, -1, 2])))
    assert "row 1 (missing)" in refused(str(parquet_of(file, [contents[0], None], [0, 1])))
    assert "row 0 (no picture)" in refused(str(parquet_of(file, [b"what", contents[0]], [0, 1])))
    skipped = open_images(str(file), on_bad="skip")
    assert skipped.index.tolist() == [1] and "row 0 (no picture)" in skipped.notes[0]
    (tmp_path / "both").mkdir()
    for split in ("train-0", "test-0"):
        parquet_of(tmp_path / f"both/{split}.parquet", contents, [0, 1, 2])
    assert "several splits (test, train)" in refused(str(tmp_path / "both"))


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    file = parquet_of(tmp_path / "a.parquet", pngs(tmp_path), [0, 1, 2])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "besiege[parquet]" in refused(str(file))


def test_paths_whose_kind_does_not_show(tmp_path):
    (tmp_path / "a.dat").write_bytes(b"")
    assert "kind does not show" in refused(str(tmp_path / "a.dat"))
