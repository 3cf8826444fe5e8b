from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgda_core.diffusion.noise import MAX_CAPTIONS
from fastgda_core.errors import BadSample, UsageError
from fastgda_core.images import decode_image
from tasks.inputs.samples import tell_of_several_pictures
from tasks.inputs.tars import Rejection, ShardSample, find_shards, read_image, scan
from tasks.progress import console
from tests.tiny import draw, sample_members, write_tar

Members = list[tuple[str, bytes]]
JPEG, CAPTION = draw(7)
MANY = [f"caption {number}" for number in range(MAX_CAPTIONS + 1)]
GOOD = [f"s{number:04d}" for number in range(3)]


def scan_quietly(*shards: Path) -> tuple[list[ShardSample], list[Rejection]]:
    return scan(list(shards), lambda: None)


def scan_among_good(folder: Path, members: Members) -> list[Rejection]:
    """Scan members between good samples, and check that all of the good ones survive."""
    shard = write_tar(folder / "data.tar", sample_members(range(2)) + members + sample_members(range(2, 3)))
    samples, rejections = scan_quietly(shard)
    assert [sample.key for sample in samples if sample.key in GOOD] == GOOD
    assert all(rejection.shard == str(shard) for rejection in rejections)
    return rejections


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def giant_png(side: int) -> bytes:
    """A valid file of a few bytes that announces side x side pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_good_samples_are_found_where_they_lie(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "data.tar", sample_members(range(5)))
    samples, rejections = scan_quietly(shard)
    assert rejections == []
    assert [sample.key for sample in samples] == [f"s{number:04d}" for number in range(5)]
    for number, sample in enumerate(samples):
        encoded, caption = draw(number)
        assert shard.read_bytes()[sample.offset : sample.offset + sample.size] == encoded
        assert sample.captions == [caption]
        assert (sample.width, sample.height) == (24, 24)
        found = read_image(sample.shard, sample.offset, sample.size)
        assert found.tobytes() == Image.open(io.BytesIO(encoded)).tobytes()


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp", "PNG"])
def test_every_promised_image_format_is_read(tmp_path: Path, kind: str) -> None:
    image = encode(Image.new("RGB", (6, 4), "teal"), {"jpg": "JPEG"}.get(kind, kind))
    samples, rejections = scan_quietly(write_tar(tmp_path / "data.tar", [(f"a.{kind}", image), ("a.txt", b"teal")]))
    assert rejections == []
    assert [(sample.width, sample.height) for sample in samples] == [(6, 4)]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ({"txt": b"a cat"}, ["a cat"]),
        ({"txt": b" a\n  cat\t"}, ["a cat"]),
        ({"json": b'{"captions": ["a cat", "a kitten"]}'}, ["a cat", "a kitten"]),
        ({"json": b'{"captions": ["a cat", " a  cat ", "", 3, "a kitten"]}'}, ["a cat", "a kitten"]),
        ({"json": b'{"caption": "a cat", "id": 3}'}, ["a cat"]),
        ({"json": b'{"caption": "a cat"}', "txt": b"a dog"}, ["a cat"]),
        ({"json": b'{"id": 3}', "txt": b"a dog"}, ["a dog"]),
        ({"json": b"[1, 2]", "txt": b"a dog"}, ["a dog"]),
        ({"json": '{"captions": ["katt 🐈"]}'.encode()}, ["katt 🐈"]),
    ],
)
def test_captions_come_from_json_or_text(tmp_path: Path, captions: dict[str, bytes], expected: list[str]) -> None:
    members = [("a.jpg", JPEG), *((f"a.{suffix}", content) for suffix, content in captions.items())]
    samples, rejections = scan_quietly(write_tar(tmp_path / "data.tar", members))
    assert rejections == []
    assert [sample.captions for sample in samples] == [expected]


@settings(max_examples=60)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.sampled_from(["txt", "json"])
)
def test_any_caption_survives(tmp_path_factory: pytest.TempPathFactory, caption: str, suffix: str) -> None:
    document = caption if suffix == "txt" else json.dumps({"captions": [caption]})
    members = [("a.jpg", JPEG), (f"a.{suffix}", document.encode())]
    samples, rejections = scan_quietly(write_tar(tmp_path_factory.mktemp("caption") / "data.tar", members))
    assert rejections == []
    assert samples[0].captions == [" ".join(caption.split())]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("bad.jpg", b"no image"), ("bad.txt", b"a cat")], "does not decode"),
        ([("bad.jpg", b""), ("bad.txt", b"a cat")], "does not decode"),
        ([("bad.jpg", JPEG[: len(JPEG) // 2]), ("bad.txt", b"a cat")], "does not decode"),
        ([("bad.png", giant_png(60_000)), ("bad.txt", b"a cat")], "does not decode"),
        ([("bad.png", giant_png(11_000)), ("bad.txt", b"a cat")], "does not decode"),
        ([("bad.jpg", JPEG)], "no caption"),
        ([("bad.txt", b"a cat")], "no image"),
        ([("bad.jpg", JPEG), ("bad.txt", b" \n\t")], "no caption"),
        ([("bad.jpg", JPEG), ("bad.json", b'{"captions": []}')], "no caption"),
        ([("bad.jpg", JPEG), ("bad.json", b'{"caption": 3}')], "no caption"),
        ([("bad.jpg", JPEG), ("bad.json", json.dumps({"captions": MANY}).encode())], "has 32,769 captions"),
        ([("bad.jpg", JPEG), ("bad.txt", b"caf\xe9")], "UTF-8"),
        ([("bad.jpg", JPEG), ("bad.json", b'{"caption": "a cat"')], "does not decode"),
        ([("bad.jpg", JPEG), ("bad.json", b"[" * 200_000)], "does not decode"),
        ([("bad.jpg", JPEG), ("bad.json", b'{"caption": "a \\ud83d cat"}')], "does not decode"),
        (
            [("bad.jpg", JPEG), ("bad.png", encode(Image.new("RGB", (4, 4)), "PNG")), ("bad.txt", b"x")],
            "several images",
        ),
        ([("bad.jpg", JPEG), ("bad.txt", b"a"), ("bad.txt", b"a")], "duplicate key"),
        ([("s0000.jpg", JPEG), ("s0000.txt", b"a cat")], "duplicate key"),
    ],
    ids=[
        "no image",
        "empty image",
        "truncated JPEG",
        "giant dimensions",
        "large dimensions",
        "no caption",
        "caption alone",
        "blank caption",
        "empty caption list",
        "caption of a wrong type",
        "more captions than noise is made for",
        "caption not UTF-8",
        "broken JSON",
        "deep JSON",
        "half a character in JSON",
        "two images",
        "duplicate caption",
        "duplicate key",
    ],
)
def test_a_bad_sample_is_named_once_and_its_neighbours_survive(tmp_path: Path, members: Members, reason: str) -> None:
    (rejection,) = scan_among_good(tmp_path, members)
    assert rejection.key == members[0][0].partition(".")[0]
    assert reason in rejection.reason


def test_a_key_in_two_tars_is_used_once(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", sample_members(range(3)))
    second = write_tar(tmp_path / "b.tar", sample_members(range(2, 4)))
    samples, (rejection,) = scan_quietly(first, second)
    assert [(sample.key, sample.shard) for sample in samples] == [
        ("s0000", str(first)),
        ("s0001", str(first)),
        ("s0002", str(first)),
        ("s0003", str(second)),
    ]
    assert (rejection.shard, rejection.key) == (str(second), "s0002")
    assert str(first) in rejection.reason


def test_the_same_name_in_two_folders_of_a_tar_is_two_samples(tmp_path: Path) -> None:
    members = [("x/a.jpg", JPEG), ("x/a.txt", b"a cat"), ("y.z/a.jpg", JPEG), ("y.z/a.txt", b"a dog")]
    samples, rejections = scan_quietly(write_tar(tmp_path / "data.tar", members))
    assert rejections == []
    assert [(sample.key, sample.captions) for sample in samples] == [("x/a", ["a cat"]), ("y.z/a", ["a dog"])]


def pair(key: str) -> Members:
    return [(f"{key}.jpg", JPEG), (f"{key}.txt", key.encode())]


@pytest.mark.parametrize(
    ("members", "used", "rejected"),
    [
        ([*pair("photo.v2.0001"), *pair("photo.v2.0002")], ["photo.v2.0001", "photo.v2.0002"], []),
        ([*pair("a.b/photo.v2"), *pair("a.b/photo.v3")], ["a.b/photo.v2", "a.b/photo.v3"], []),
        ([*pair("photo"), *pair("photo.v2")], ["photo", "photo.v2"], []),
        ([*pair("1"), ("1.seg.png", JPEG), ("1.cls.txt", b"3"), ("1.cls", b"3"), ("1.pose.npy", b"")], ["1"], []),
        ([*pair("p.v2"), ("p.v2.seg.png", JPEG)], ["p.v2"], []),
        ([("1.txt", b"a cat"), ("1.seg.png", JPEG)], [], ["1", "1.seg"]),
        ([("1.jpg", JPEG), ("1.caption.txt", b"a cat")], [], ["1", "1.caption"]),
        ([("p.v2.jpg", JPEG), ("p.v3.jpg", JPEG)], [], ["p.v2", "p.v3"]),
        ([(name, b"") for name in ("p.v2.npy", "p.v3.npy", "README", ".jpg", "..")], [], ["p", "README", ".jpg", ".."]),
        ([*pair("s" * 5000)], [], ["s" * 4096]),
    ],
    ids=[
        "only dotted",
        "dotted folder",
        "dotted beside undotted",
        "fields of a sample",
        "fields of a dotted sample",
        "image under a longer name",
        "caption under a longer name",
        "no captions",
        "nothing of ours",
        "long name",
    ],
)
def test_dots_in_a_name_lose_nothing(tmp_path: Path, members: Members, used: list[str], rejected: list[str]) -> None:
    samples, rejections = scan_quietly(write_tar(tmp_path / "data.tar", members))
    assert [sample.key for sample in samples] == used
    assert list(dict.fromkeys(rejection.key for rejection in rejections)) == rejected


@pytest.mark.parametrize("what", ["damaged", "joined with cat", "of negative size"])
def test_what_lies_behind_is_not_lost_in_silence(tmp_path: Path, what: str) -> None:
    shard = write_tar(tmp_path / "data.tar", sample_members(range(3)))
    content = bytearray(shard.read_bytes())
    last = layout(shard)[-1].offset
    if what == "damaged":
        content[last : last + 512] = b"x" * 512
    elif what == "of negative size":
        content[last + 124 : last + 136] = b"\xff" * 10 + b"\xfc\x00"  # -1024: back to the member before
        content[last + 148 : last + 156] = b" " * 8
        content[last + 148 : last + 156] = b"%06o\0 " % sum(content[last : last + 512])
    else:
        content += write_tar(tmp_path / "more.tar", sample_members(range(3, 5))).read_bytes()
    shard.write_bytes(content)
    samples, rejections = scan_quietly(shard)
    assert [sample.key for sample in samples] == (GOOD if what.startswith("joined") else GOOD[:2])
    assert rejections[-1].key == "" and "damaged" in rejections[-1].reason


def no_members(path: Path) -> None:
    write_tar(path, [])


def no_bytes(path: Path) -> None:
    path.touch()


def no_tar(path: Path) -> None:
    path.write_bytes(b"this is no tar at all " * 100)


def nothing_of_ours(path: Path) -> None:
    write_tar(path, [("readme.md", b"hello"), ("readme.cls", b"3")])


def test_sizes_are_those_of_upright_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    members = [("a.jpg", buffer.getvalue()), ("a.txt", b"a cat")]
    ((sample,), _) = scan_quietly(write_tar(tmp_path / "data.tar", members))
    assert (sample.width, sample.height) == (4, 6)


def test_of_animations_the_first_picture_is_used_and_said_once_a_tar(tmp_path: Path) -> None:
    buffer, red, blue = io.BytesIO(), Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    red.save(buffer, "WEBP", save_all=True, append_images=[blue], lossless=True)
    moving = [(f"{key}.webp", buffer.getvalue()) for key in "ab"] + [(f"{key}.txt", b"red") for key in "ab"]
    samples, _ = scan_quietly(write_tar(tmp_path / "data.tar", [*moving, *sample_members(range(1))]))
    assert [sample.pictures for sample in samples] == [2, 2, 1]
    first = read_image(samples[0].shard, samples[0].offset, samples[0].size)
    assert first.getpixel((0, 0)) == (255, 0, 0)
    with console.capture() as said:
        tell_of_several_pictures(each.shard for each in samples if each.pictures > 1)
    assert " ".join(said.get().split()).count("picture is used of 2 images") == said.get().count("data.tar") == 1


def zipped(path: Path) -> None:
    write_tar(path, sample_members(range(3)))
    path.write_bytes(gzip.compress(path.read_bytes()))


def nowhere(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("make", "key", "reason"),
    [
        (no_members, "", "empty"),
        (no_bytes, "", "damaged"),
        (no_tar, "", "damaged"),
        (nothing_of_ours, "readme", "no sample"),
        (zipped, "", "gzip"),
        (nowhere, "", "damaged"),
    ],
)
def test_a_useless_shard_is_named_once_and_the_other_shards_survive(
    tmp_path: Path, make: Callable[[Path], None], key: str, reason: str
) -> None:
    bad = tmp_path / "bad.tar"
    make(bad)
    before = write_tar(tmp_path / "a.tar", sample_members(range(1)))
    after = write_tar(tmp_path / "c.tar", sample_members(range(1, 3)))
    samples, (rejection,) = scan_quietly(before, bad, after)
    assert [sample.key for sample in samples] == GOOD
    assert (rejection.shard, rejection.key) == (str(bad), key)
    assert reason in rejection.reason


def cut(shard: Path, end: int) -> Path:
    shard.write_bytes(shard.read_bytes()[:end])
    return shard


def layout(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def test_a_tar_cut_inside_its_last_image_keeps_the_samples_before(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "data.tar", [*sample_members(range(3)), ("last.txt", b"a cat"), ("last.jpg", JPEG)])
    last = layout(shard)[-1]
    samples, rejections = scan_quietly(cut(shard, last.offset_data + last.size // 2))
    assert [sample.key for sample in samples] == GOOD
    assert {rejection.key for rejection in rejections} == {"", "last"}
    assert {rejection.shard for rejection in rejections} == {str(shard)}


def test_half_of_a_caption_is_never_taken_for_the_whole(tmp_path: Path) -> None:
    caption = b"a cat on a mat"
    shard = write_tar(tmp_path / "data.tar", [*sample_members(range(3)), ("last.jpg", JPEG), ("last.txt", caption)])
    samples, rejections = scan_quietly(cut(shard, layout(shard)[-1].offset_data + 5))
    assert [sample.key for sample in samples] == GOOD
    assert {rejection.key for rejection in rejections} == {"", "last"}


@pytest.mark.parametrize("into_header", [0, 200])
def test_a_tar_cut_between_members_is_named(tmp_path: Path, into_header: int) -> None:
    shard = write_tar(tmp_path / "data.tar", sample_members(range(5)))
    samples, rejections = scan_quietly(cut(shard, layout(shard)[6].offset + into_header))
    assert [sample.key for sample in samples] == GOOD
    assert [(rejection.shard, rejection.key) for rejection in rejections] == [(str(shard), "")]


def test_samples_behind_a_damaged_header_are_not_lost_in_silence(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "data.tar", sample_members(range(5)))
    content = bytearray(shard.read_bytes())
    start = layout(shard)[6].offset
    content[start : start + 512] = b"\xaa" * 512
    shard.write_bytes(content)
    samples, rejections = scan_quietly(shard)
    assert [sample.key for sample in samples] == GOOD
    assert [(rejection.shard, rejection.key) for rejection in rejections] == [(str(shard), "")]


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]


@pytest.mark.parametrize("kind", KINDS)
def test_links_devices_and_sparse_files_are_named_and_folders_hold_nothing(tmp_path: Path, kind: bytes) -> None:
    shard = tmp_path / "data.tar"
    with tarfile.open(shard, "w") as tar:
        odd = tarfile.TarInfo("link.jpg")
        odd.type, odd.linkname = kind, "/etc/passwd"
        tar.addfile(odd)
        for name, content in [("link.txt", b"a cat"), *sample_members(range(3))]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    samples, (rejection,) = scan_quietly(shard)
    assert [sample.key for sample in samples] == GOOD
    assert rejection.key == "link"
    assert ("no image" if kind == tarfile.DIRTYPE else "store the whole file") in rejection.reason


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.path,))  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", ["pkl", "pyd", "pickle", "pth"])
def test_a_pickle_is_never_loaded(tmp_path: Path, suffix: str) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    assert sprung.exists()
    sprung.unlink()
    (rejection,) = scan_among_good(tmp_path, [(f"s0001.{suffix}", trap), (f"other.{suffix}", trap)])
    assert rejection.key == "other"
    assert not sprung.exists()


def test_a_member_whose_name_is_not_utf8_leaves_names_that_can_be_stored(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "data.tar", sample_members(range(3)))
    shard.write_bytes(rename_member(shard.read_bytes(), b"s0001.", b"s\xff\xfe01."))
    samples, rejections = scan_quietly(shard)
    assert [sample.key for sample in samples if sample.key in GOOD] == ["s0000", "s0002"]
    for item in [*samples, *rejections]:
        assert item.key.encode("utf-8")
        assert getattr(item, "reason", "").isprintable()


def rename_member(content: bytes, old: bytes, new: bytes) -> bytes:
    """Rename members inside a tar, with right header checksums."""
    blocks = bytearray(content)
    start = blocks.find(old)
    while start >= 0:
        blocks[start : start + len(old)] = new
        blocks[start + 148 : start + 156] = b" " * 8
        blocks[start + 148 : start + 156] = b"%06o\0 " % sum(blocks[start : start + 512])
        start = blocks.find(old)
    return bytes(blocks)


def test_transparency_is_shown_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    found = decode_image(encode(image, "PNG"))
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = found.getpixel((1, 0))
    assert red == 255
    assert green == blue
    assert abs(green - 127) <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    found = decode_image(encode(Image.new(mode, (3, 2)), "JPEG" if mode == "CMYK" else "PNG"))
    assert (found.mode, found.size) == ("RGB", (3, 2))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "EPS"])
def test_other_formats_are_refused_whatever_their_suffix(kind: str) -> None:
    with pytest.raises(BadSample, match="does not decode"):
        decode_image(encode(Image.new("RGB", (8, 8)), kind))


@settings(max_examples=150)
@given(
    st.sampled_from([encode(Image.new("RGB", (9, 9), "teal"), kind) for kind in ("PNG", "JPEG", "WEBP")]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(1, 10_000),
)
def test_a_damaged_image_is_an_image_or_a_bad_sample(
    encoded: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(encoded)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    try:
        found = decode_image(bytes(damaged[:length]))
    except BadSample:
        return
    assert found.mode == "RGB"


def test_shards_are_found_by_a_glob_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "deep/c.tar", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    assert find_shards(f"{tmp_path}/*.tar", "data.shards") == [tmp_path / "a.tar", tmp_path / "b.tar"]
    assert find_shards(f"{tmp_path}/**/*.tar", "data.shards")[-1] == tmp_path / "deep" / "c.tar"


def test_a_glob_without_matches_names_the_field_and_the_glob(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.shards matches no file") as refusal:
        find_shards(f"{tmp_path}/*.tar", "data.shards")
    assert f"{tmp_path}/*.tar" in str(refusal.value)


def test_progress_counts_every_shard(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / f"{number}.tar", sample_members(range(number, number + 1))) for number in range(3)]
    done = []
    scan(shards, lambda: done.append(1))
    assert len(done) == 3
