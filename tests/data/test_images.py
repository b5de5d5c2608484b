from __future__ import annotations

import io
import random
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
from picture_builders import (
    chunk,
    encoded,
    heic,
    jpeg,
    noisy,
    photo,
    png,
    png_bomb,
    png_with,
    with_orientation,
)
from PIL import Image, ImageFile

from mmsearch.data.images import Limits, open_image, prepare
from mmsearch.errors import ImageError, UsageError
from mmsearch.types import Preprocessing, SkipReason


def pixels(data: bytes, **options) -> np.ndarray:
    return np.asarray(open_image(data, **options)[0]).astype(int)


def refusal(data: bytes, **options) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(data, where="picture.jpg", **options)
    return caught.value


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_an_empty_file_is_skipped_as_empty():
    """Row 1."""
    assert refusal(b"").reason == SkipReason.EMPTY


@pytest.mark.parametrize(
    "data", [b"hello world", b"<!DOCTYPE html><html>gone</html>", b"\n <html>", b"\0" * 64, b"\xff\xd8"]
)
def test_text_or_html_with_a_pictures_name_is_not_an_image(data):
    """Row 2."""
    assert refusal(data).reason == SkipReason.NOT_AN_IMAGE


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_a_truncated_picture_is_skipped_never_filled_with_grey(format, share):
    """Row 3, for every format: some bytes missing is an error with reason "truncated"."""
    data = encoded(noisy(), format)
    assert refusal(data[: int(len(data) * share)]).reason == SkipReason.TRUNCATED
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_heic_or_progressive_jpeg_is_skipped(share):
    """Row 3."""
    for data in (heic(noisy()), jpeg(noisy(), progressive=True)):
        assert refusal(data[: int(len(data) * share)]).reason == SkipReason.TRUNCATED


def test_a_jpeg_damaged_in_the_middle_is_noted_or_skipped():
    """Row 4: libjpeg only warns; the note says what it swallowed."""
    data = jpeg(noisy())
    middle = len(data) // 2
    assert "unexpected data at byte" in open_image(overwritten(data, middle, b"\xff\xe0\0\x10"))[1].note
    assert refusal(overwritten(data, middle, b"\xff\x02")).reason == SkipReason.DAMAGED
    assert open_image(data)[1].note == ""


def overwritten(data: bytes, at: int, body: bytes) -> bytes:
    return data[:at] + body + data[at + len(body) :]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("target", [None, 32])
def test_an_end_mark_that_comes_too_early_does_not_make_a_cut_jpeg_whole(share, target):
    """Row 3: the decoder would fill the rest with grey without a word."""
    data = jpeg(noisy())
    start = data.index(b"\xff\xda") + 20
    cut = data[: start + int((len(data) - start) * share)] + b"\xff\xd9"
    assert refusal(cut, target=target).reason == SkipReason.TRUNCATED


def test_a_picture_that_really_ends_in_grey_is_read():
    """Row 3, the other side: exactly the grey that a decoder fills in, but drawn."""
    image = noisy()
    image.paste((128, 128, 128), (0, 120, 320, 240))
    for picture in (image, image.convert("L"), Image.new("RGB", (50, 50), (128, 128, 128))):
        for options in ({}, {"progressive": True}):
            assert open_image(jpeg(picture, **options))[1].note == ""


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 4}, {"optimize": True}])
def test_a_whole_jpeg_of_any_kind_is_not_called_damaged(options):
    """Row 4, the other side: no false alarm for scans, restart markers, or data after the end."""
    data = jpeg(noisy(), **options)
    assert open_image(data)[1].note == ""
    assert open_image(data + b"\0" * 100)[1].note == ""


def test_a_png_bomb_is_refused_before_it_is_decoded():
    """Row 5: 400 megapixels in 50 KB; memory stays where it was."""
    bomb = png_bomb(20_000)
    assert len(bomb) < 64_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refusal(bomb)
    assert error.reason == SkipReason.TOO_LARGE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_the_own_pixel_limit_counts_below_pillows():
    """Row 6: Pillow only warns at 144 megapixels; our limit is exact and says both numbers."""
    bomb = png_bomb(12_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = refusal(bomb, limits=Limits(max_pixels=100_000_000))
    assert (error.reason, error.detail) == (SkipReason.TOO_LARGE, "144 MP, limit 100")
    assert open_image(png_bomb(100), limits=Limits(max_pixels=10_000))[1].width == 100
    assert refusal(png_bomb(101), limits=Limits(max_pixels=10_000)).reason == SkipReason.TOO_LARGE


def test_huge_side_information_in_a_png_takes_no_memory():
    """Row 7: 256 MB behind a zTXt or iCCP chunk, a megabyte of EXIF: bounded, indexed or skipped."""
    import zlib

    zeros = zlib.compressobj(9)
    packed = b"".join(zeros.compress(b"\0" * (1 << 20)) for _ in range(256)) + zeros.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, body in ((b"zTXt", b"k\0\0" + packed), (b"iCCP", b"k\0\0" + packed), (b"eXIf", b"MM" + b"\0" * 2**20)):
        try:
            assert open_image(png_with(kind, body))[0].size == (96, 64)
        except ImageError as error:
            assert error.reason in (SkipReason.DAMAGED, SkipReason.TOO_LARGE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def sixteen_bit_files() -> dict[str, bytes]:
    grey = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    wide = Image.fromarray(grey)
    big_endian = Image.frombytes("I;16B", wide.size, grey.astype(">u2").tobytes())
    return {
        "png": png(wide),
        "tiff": encoded(wide, "TIFF"),
        "tiff big-endian": encoded(big_endian, "TIFF"),
        "tiff 32-bit": encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"),
        "tiff 32-bit, values of 8": encoded(Image.fromarray((grey // 257).astype(np.int32)), "TIFF"),
        "tiff float 0..1": encoded(Image.fromarray((grey / 65535).astype(np.float32)), "TIFF"),
        "tiff float 0..255": encoded(Image.fromarray((grey / 257).astype(np.float32)), "TIFF"),
    }


@pytest.mark.parametrize("kind", sixteen_bit_files())
def test_deep_grey_is_scaled_not_saturated(kind):
    """Row 8: the same picture as its 8-bit version, whatever the depth and byte order."""
    expected = np.asarray(photo().convert("L")).astype(int)
    found = pixels(sixteen_bit_files()[kind])
    assert np.abs(found - expected[..., None]).max() <= 1
    assert abs(found.mean() - expected.mean()) < 1


def test_float_with_other_ranges_is_stretched_and_nan_is_black():
    """Row 8: elevation models and the like are shown between their extremes."""
    values = np.linspace(-100, 1000, 64, dtype=np.float32).reshape(8, 8)
    found = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)
    values[0, 5] = np.nan
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, 5, 0] == 0


def cmyk_red() -> Image.Image:
    return Image.new("CMYK", (64, 64), (0, 255, 255, 0))


def test_cmyk_jpeg_comes_out_in_the_right_colours():
    """Row 9: no cyan, full magenta and yellow is red; Adobe's inversion is undone."""
    found = pixels(jpeg(cmyk_red(), quality=95)).mean((0, 1))
    assert np.abs(found - (255, 0, 0)).max() < 6


def test_ycck_jpeg_comes_out_in_the_right_colours():
    """Row 9: the same red, stored as luminance and colour differences of its complement."""
    stored = jpeg(Image.new("CMYK", (64, 64), (255 - 179, 255 - 171, 255 - 1, 0)), quality=95)
    transform = stored.index(b"Adobe") + 11
    found = pixels(stored[:transform] + b"\2" + stored[transform + 1 :]).mean((0, 1))
    assert np.abs(found - (255, 0, 0)).max() < 12


def half_transparent() -> Image.Image:
    """Black throughout; alpha 255 left, 0 right."""
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (32, 0, 64, 32))
    return image


def transparent_files() -> dict[str, bytes]:
    palette = Image.new("P", (64, 32), 0)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(1, (32, 0, 64, 32))
    return {
        "RGBA png": png(half_transparent()),
        "LA png": png(half_transparent().convert("LA")),
        "P + tRNS png": png(palette, transparency=1),
        "P + tRNS gif": encoded(palette, "GIF", transparency=1),
        "L + tRNS png": png(palette.convert("L").point(lambda v: v), transparency=0),
        "RGBA webp": encoded(half_transparent(), "WEBP", lossless=True),
        "RGBA avif": encoded(half_transparent(), "AVIF", quality=100),
        "RGBA tiff": encoded(half_transparent(), "TIFF"),
    }


@pytest.mark.parametrize("kind", transparent_files())
def test_transparency_is_laid_over_white(kind):
    """Row 10: what nobody can see does not count; colour under full transparency becomes white."""
    found = pixels(transparent_files()[kind])
    assert found[:, 40:].min() > 250
    assert found[:, :24].max() < 5 or kind.startswith("L +")


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_is_taken_and_said(format):
    """Row 11."""
    image, info = open_image(animated(format))
    assert info.note == "first of 3 frames"
    assert np.abs(np.asarray(image).astype(int).mean((0, 1)) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_gives_the_upright_picture(format, orientation):
    """Row 12: all eight give the same input of the model, and the size after rotation."""
    image, info = open_image(with_orientation(photo(), orientation, format))
    assert (info.width, info.height) == (96, 64)
    upright = prepare(photo(), Preprocessing(size=32)).astype(float)
    assert cosine(prepare(image, Preprocessing(size=32)).astype(float), upright) > 0.995


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_and_scaled_decoding_go_together(orientation):
    """Row 12 with `target`: the size told is that of the whole picture, upright."""
    big = photo(960, 640)
    image, info = open_image(with_orientation(big, orientation), target=64)
    assert (info.width, info.height) == (960, 640)
    assert image.size == (120, 80)
    upright = prepare(big, Preprocessing(size=32)).astype(float)
    assert cosine(prepare(image, Preprocessing(size=32)).astype(float), upright) > 0.995


def test_an_impossible_orientation_is_ignored():
    """Row 12: tag value 9 or 0 leaves the picture as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 9
    assert open_image(jpeg(exif=exif.tobytes()))[0].size == (96, 64)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (2, 3)])
@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_extreme_shapes_are_prepared_like_any_other(size, fit):
    """Row 13."""
    image, info = open_image(png(Image.new("RGB", size, (10, 200, 30))), target=32)
    assert (info.width, info.height) == size
    found = prepare(image, Preprocessing(size=32, fit=fit))
    assert found.shape == (32, 32, 3)
    assert [10, 200, 30] in found.reshape(-1, 3).tolist()


@pytest.mark.parametrize("mode", ["L", "1", "P"])
@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF"])
def test_grey_one_bit_and_palette_pictures_become_rgb(mode, format):
    """Row 13."""
    stored = photo().convert(mode)
    expected = np.asarray(stored.convert("RGB")).astype(int)
    found = pixels(encoded(stored, format))
    assert np.abs(found - expected).max() <= 1


def test_grey_jpeg_is_scaled_on_decoding_too():
    """Row 13."""
    assert open_image(jpeg(photo(960, 640).convert("L")), target=64)[0].size == (120, 80)


@pytest.mark.parametrize("make", [heic, lambda image: encoded(image, "AVIF", quality=90)])
def test_heic_and_avif_are_read(make):
    """Row 14: both are read as installed; the colours are right."""
    found = pixels(make(photo()))
    assert np.abs(found - np.asarray(photo())).mean() < 6


def test_heic_orientation_is_applied_once():
    """Rows 12, 14: the decoder turns the picture itself; it must not be turned again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image, info = open_image(heic(photo().transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes()))
    assert (info.width, info.height) == image.size == (96, 64)
    assert cosine(np.asarray(image).astype(float), np.asarray(photo()).astype(float)) > 0.99


DISGUISED = {
    "EPS": encoded(photo(), "EPS"),
    "EPS with a preview": b"\xc5\xd0\xd3\xc6" + b"\0" * 60,
    "PDF": b"%PDF-1.7\n" + b"\0" * 60,
    "PSD": b"8BPS\0\1" + b"\0" * 60,
    "FITS": b"SIMPLE  =                    T" + b" " * 60,
    "ICNS": encoded(photo(), "ICNS"),
    "ICO": encoded(photo(), "ICO"),
    "PPM": encoded(photo(), "PPM"),
    "TGA": encoded(photo(), "TGA"),
    "PCX": encoded(photo(), "PCX"),
    "JPEG 2000": encoded(photo(), "JPEG2000"),
    "DDS": encoded(photo(), "DDS"),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0" * 30,
}


@pytest.mark.parametrize("kind", DISGUISED)
def test_formats_outside_the_list_are_refused_whatever_they_are_called(kind):
    """Row 17: the content decides, and no decoder outside the list is even tried."""
    assert refusal(DISGUISED[kind]).reason in (SkipReason.UNSUPPORTED, SkipReason.NOT_AN_IMAGE)
    if kind in ("EPS", "PDF", "PSD", "FITS"):
        assert refusal(DISGUISED[kind]).reason == SkipReason.UNSUPPORTED
        assert refusal(DISGUISED[kind]).detail.startswith("it is ")


def test_no_decoder_outside_the_list_is_ever_imported():
    """Row 17: PostScript and the like are not even loaded."""
    code = (
        "import sys\nfrom mmsearch.data.images import open_image\n"
        "for data in (b'%!PS-Adobe-3.0 EPSF', b'\\xff\\xd8\\xff\\xe0broken', b'GIF89abroken'):\n"
        "    try: open_image(data)\n    except Exception: pass\n"
        "print([m for m in sys.modules if m.startswith('PIL.') and m[4:7] in ('Eps', 'Psd', 'Fit', 'Pdf')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "[]"


def test_a_progressive_jpeg_is_read_and_a_12_bit_one_is_unsupported():
    """Row 18."""
    assert np.abs(pixels(jpeg(progressive=True)) - np.asarray(photo())).mean() < 6
    data = jpeg()
    precision = data.index(b"\xff\xc0") + 4
    error = refusal(data[:precision] + b"\x0c" + data[precision + 1 :])
    assert (error.reason, error.detail) == (SkipReason.UNSUPPORTED, "12-bit JPEG")


def test_a_lossless_jpeg_is_unsupported():
    """Row 18."""
    error = refusal(jpeg().replace(b"\xff\xc0", b"\xff\xc3", 1))
    assert (error.reason, error.detail) == (SkipReason.UNSUPPORTED, "lossless JPEG")


def test_decoding_at_reduced_scale_hardly_changes_the_models_input():
    """The smallest scale with both sides >= target, and within 2 grey levels of the full decode."""
    data = jpeg(noisy(1600, 1200))
    image, _ = open_image(data, target=260)
    assert image.size == (400, 300)
    full = prepare(open_image(data)[0], Preprocessing()).astype(float)
    drift = np.abs(prepare(image, Preprocessing()).astype(float) - full)
    assert drift.mean() < 2


CASES = [(75, (100, 75)), (76, (200, 150)), (100, (200, 150)), (600, (800, 600)), (601, (800, 600))]


@pytest.mark.parametrize(("target", "size"), CASES)
def test_reduced_scale_never_falls_below_the_target(target, size):
    """An 800 x 600 JPEG at target t: both sides stay >= min(t, their size)."""
    image, _ = open_image(jpeg(photo(800, 600)), target=target)
    assert image.size == size
    assert min(image.size) >= min(target, 600)


def test_the_time_a_photo_was_taken_is_iso_8601():
    """EXIF DateTimeOriginal with its offset; impossible dates are dropped, the picture stays."""
    for stored, offset, expected in (
        ("2021:07:04 12:30:05", "+02:00", "2021-07-04T12:30:05+02:00"),
        ("2021:07:04 12:30:05", None, "2021-07-04T12:30:05"),
        ("0000:00:00 00:00:00", None, None),
        ("2021:13:45 99:99:99", None, None),
    ):
        exif = Image.Exif()
        details = exif.get_ifd(0x8769)
        details[0x9003] = stored
        if offset:
            details[0x9011] = offset
        assert open_image(jpeg(exif=exif.tobytes()))[1].taken_at == expected


def test_broken_exif_costs_nothing_and_says_nothing(capfd):
    """Garbage where EXIF should be: the picture is read, nothing is warned about or printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for exif in (b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xfe" * 40):
            image, info = open_image(jpeg(exif=exif))
            assert (image.size, info.taken_at) == ((96, 64), None)
    assert capfd.readouterr() == ("", "")


def test_a_path_is_read_and_named_in_errors(tmp_path):
    """`source` may be a path; the error says which file."""
    good, bad = tmp_path / "a.jpg", tmp_path / "b.jpg"
    good.write_bytes(jpeg())
    bad.write_bytes(b"nothing")
    assert open_image(good)[0].size == (96, 64)
    with pytest.raises(ImageError, match=r"b\.jpg"):
        open_image(str(bad))


def test_prepare_squashes_crops_and_pads():
    """Known picture: left half black, right half white, 80 x 40."""
    image = Image.new("RGB", (80, 40))
    image.paste((255, 255, 255), (40, 0, 80, 40))
    squash = prepare(image, Preprocessing(size=40))
    assert (squash[:, :18].max(), squash[:, 22:].min()) == (0, 255)
    crop = prepare(image, Preprocessing(size=40, fit="crop"))
    assert (crop[:, :20].max(), crop[:, 20:].min()) == (0, 255)
    pad = prepare(image, Preprocessing(size=40, fit="pad", mean=(1.0, 0.0, 0.0)))
    assert pad[0, 0].tolist() == pad[-1, -1].tolist() == [255, 0, 0]
    assert (pad[10:30, :18].max(), pad[10:30, 22:].min()) == (0, 255)


def test_prepare_refuses_what_it_does_not_know():
    """An unknown fit or interpolation is a usage error that lists the known ones."""
    with pytest.raises(UsageError, match="squash, crop or pad"):
        prepare(photo(), Preprocessing(fit="stretch"))
    with pytest.raises(UsageError, match="bicubic"):
        prepare(photo(), Preprocessing(interpolation="magic"))


def test_random_damage_never_raises_anything_but_an_image_error():
    """A thousand mutations of good files: a picture comes out, or an ImageError with a reason."""
    generator = random.Random(7)
    files = [encoded(photo(48, 32), format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")]
    files.append(encoded(photo(48, 32), "TIFF", compression="raw"))
    for _ in range(1000):
        data = bytearray(generator.choice(files))
        for _ in range(generator.randint(1, 8)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        try:
            image, info = open_image(bytes(data), limits=Limits(max_pixels=1_000_000))
            assert image.mode == "RGB"
            assert info.width * info.height <= 1_000_000
        except ImageError as error:
            assert error.reason in SkipReason


def test_a_multi_picture_jpeg_is_read_as_its_first():
    """Phones put previews and depth maps behind the photo; these are no frames to speak of."""
    out = io.BytesIO()
    photo().save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")])
    image, info = open_image(out.getvalue(), target=64)
    assert (image.size, info.note, info.format) == ((96, 64), "", "JPEG")


def test_chunks_are_built_right():
    """The builder's own check: a PNG with a harmless extra chunk is a good PNG."""
    assert chunk(b"IEND", b"") == png()[-12:]
