import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_protector.errors import InputError
from mllm_protector.images import MAX_PIXELS, EncodedImage, ImageFile


def encoded(image, kind="PNG", **settings):
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def png_of_zeros(width, height):
    """A 1-bit PNG that is small on disk, whatever its size in pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    line = b"\0" * (1 + (width + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_file_is_read_late_by_its_content_and_named_where_it_cannot_be_read(tmp_path):
    source = ImageFile(tmp_path / "photo.jpg")
    source.path.write_bytes(encoded(Image.new("RGB", (40, 30), "red"), "PNG"))
    assert source.load().getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "empty.png").touch()
    for path, message in [
        (tmp_path / "gone.png", r"gone\.png: cannot read the image \(No such file"),
        (tmp_path, "cannot read the image"),
        (tmp_path / "empty.png", r"empty\.png: the image file is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            ImageFile(path).load()


def test_what_is_truncated_or_no_image_is_refused_by_name():
    broken = [b"<svg></svg>", b"GIF89a", b"\xff\xd8\xff\xe0junk", b"\0" * 100]
    for kind in ("PNG", "JPEG", "GIF"):
        data = encoded(Image.effect_noise((64, 64), 50), kind)
        broken += [data[:4], data[:40], data[: len(data) // 2], data[: int(len(data) * 0.98)]]
    for data in broken:
        with pytest.raises(InputError, match="row 7: not a readable image"):
            EncodedImage(data, "row 7").load()


def test_a_bomb_is_refused_before_it_unfolds(monkeypatch):
    assert EncodedImage(png_of_zeros(10_000, 5_000), "large").load().size == (10_000, 5_000)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    for size in [(20_000, 20_000), (12_000, 12_000), (10_000, 5_001)]:
        bomb = png_of_zeros(*size)
        assert len(bomb) < 100_000
        with pytest.raises(InputError, match=f"bomb: .*{MAX_PIXELS:,}"):
            EncodedImage(bomb, "bomb").load()


def test_every_mode_and_shape_becomes_rgb():
    modes = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    modes += [("JPEG", "CMYK"), ("JPEG", "L"), ("JPEG", "YCbCr"), ("TIFF", "F"), ("TIFF", "I")]
    for kind, mode in modes:
        image = EncodedImage(encoded(Image.new(mode, (5, 4)), kind), "image").load()
        assert (image.mode, image.size) == ("RGB", (5, 4)), (kind, mode)
    for size in [(1, 1), (1, 2000), (2000, 1)]:
        assert EncodedImage(encoded(Image.new("RGB", size)), "thin").load().size == size


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert EncodedImage(data, "animation").load().getpixel((0, 0)) == (255, 0, 0)


def test_a_16_bit_grey_is_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    shown = np.asarray(EncodedImage(encoded(Image.fromarray(ramp)), "ramp").load())[0, :, 0]
    assert np.abs(shown.astype(int) - np.arange(256)).max() <= 1


def test_transparent_parts_are_white_and_a_turned_image_stands_upright():
    clear = encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    assert EncodedImage(clear, "clear").load().getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    data = encoded(Image.new("RGB", (4, 2)), "JPEG", exif=turned)
    assert EncodedImage(data, "turned").load().size == (2, 4)
