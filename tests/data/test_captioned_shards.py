"""Reference sets in tar shards: what is read, and what is refused."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mulki.data import BadImage
from mulki.data.captioned_shards import find_shards, read_captioned_shards
from mulki.data.reference import read_reference
from mulki.errors import InputError
from tests.data.data_helpers import encoded, picture, write_tar


def sample(number: int, caption: str | None = "a caption", kind: str = "jpg") -> dict[str, bytes]:
    """The files of a sample; without a caption there is no text file."""
    image = encoded(picture(number), {"jpg": "JPEG"}.get(kind, kind))
    files = {f"{number:05d}.{kind}": image, f"{number:05d}.json": b"{}"}
    return files if caption is None else files | {f"{number:05d}.txt": caption.encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three and two samples."""
    root = tmp_path / "cc"
    root.mkdir()
    write_tar(root / "cc-000.tar", sample(0, "grün, rot") | sample(1) | sample(2, kind="png"))
    write_tar(root / "cc-001.tar", sample(3, " the last but one\n") | sample(4, "the last"))
    return root


def headers(whole: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        return [member.offset for member in tar]


def spoiled(whole: bytes, number: int) -> bytes:
    """With a wrong checksum in the header of that file."""
    at = headers(whole)[number] + 148
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


def test_files_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in [*sample(0).items(), *sample(0).items()]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match=r"x\.tar: .*00000\.\w+ "):
        read_reference(path)
    write_tar(path, sample(1) | {"a.001.jpg": encoded(picture(0), "jpeg"), "a.001.txt": b"one"})
    with pytest.raises(InputError, match=r"x\.tar: a\.001\.jpg: "):
        read_reference(path)
    write_tar(path, sample(1) | {"at 10.11.png": encoded(picture(0), "png")})
    with pytest.raises(InputError, match=r"x\.tar: at 10\.11\.png: .* without further dots"):
        read_reference(path, captions=False)


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    """As macOS packs them beside the others."""
    path = tmp_path / "x.tar"
    write_tar(path, sample(1) | {"._00001.jpg": b"of a Mac", "a/._00001.txt": b"of a Mac"})
    for captions in (True, False):
        assert len(read_reference(path, captions=captions)) == 1


def test_links_are_files_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"

    def pack(kind: bytes, target: str) -> Path:
        write_tar(path, sample(0) | {"00001.txt": b"the same image"})
        with tarfile.open(path, "a") as tar:
            link = tarfile.TarInfo("00001.jpg")
            link.type, link.linkname = kind, target
            tar.addfile(link)
        return path

    reference = read_reference(pack(tarfile.LNKTYPE, "00000.jpg"))
    assert reference.captions == ("a caption", "the same image")
    assert reference.images.load(0).tobytes() == reference.images.load(1).tobytes()
    with pytest.raises(InputError, match=r"00001\.jpg is a link to gone\.jpg, which is no file"):
        read_reference(pack(tarfile.LNKTYPE, "gone.jpg"))
    with pytest.raises(
        InputError, match=r"00001\.jpg is a symbolic link: pack it with tar --deref"
    ):
        read_reference(pack(tarfile.SYMTYPE, "00000.jpg"))


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_size_that_no_file_has(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    huge = tarfile.TarInfo("00000.jpg")
    huge.size = 2**80
    content = huge.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(InputError, match=f"{name}: damaged"):
        read_reference(path)


def test_a_folder_and_a_range_of_shards_are_the_same_set(folder: Path) -> None:
    ours, same = read_reference(folder), read_reference(folder / "cc-{000..001}.tar")
    assert ours.captions == same.captions
    assert ours.captions == ("grün, rot", *["a caption"] * 2, "the last but one", "the last")
    assert ours.fingerprint() == same.fingerprint()
    assert (
        ours.fingerprint() == read_reference(folder.rename(folder.parent / "moved")).fingerprint()
    )


def test_images_are_read_by_their_place(folder: Path) -> None:
    images = pickle.loads(pickle.dumps(read_reference(folder).images))
    assert len(images) == len(images.targets) == 5
    assert images.name(3) == f"{folder / 'cc-001.tar'}:00003.jpg"
    assert images.load(2).tobytes() == picture(2).tobytes()
    assert [images.load(i).size for i in range(5)] == [(16, 16)] * 5
    assert images.load(3).tobytes() != images.load(4).tobytes()


def test_one_shard_zipped_or_not_is_the_same(tmp_path: Path) -> None:
    files = sample(0, kind="png") | sample(1, kind="webp")
    for name in ("x.tar", "x.tar.gz"):
        write_tar(tmp_path / name, files)
    plain, zipped = (read_reference(tmp_path / name) for name in ("x.tar", "x.tar.gz"))
    assert plain.captions == zipped.captions == ("a caption",) * 2
    assert [plain.images.load(i) for i in (0, 1)] == [zipped.images.load(i) for i in (0, 1)]


def test_a_shard_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar.gz", sample(0) | {"1.txt": bytes(80 * 10**6)})
    assert (tmp_path / "x.tar.gz").stat().st_size < 200_000
    with pytest.raises(InputError, match=r"^--reference: \S+x\.tar\.gz: unpacks to more than 100 "):
        read_reference(tmp_path / "x.tar.gz")


def test_captions_are_not_asked_for_in_vain(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", sample(0, None) | sample(1))
    reference = read_reference(tmp_path / "x.tar", captions=False)
    assert len(reference) == 2 and reference.captions is None
    with pytest.raises(InputError, match=r"^--reference: \S+x\.tar: 00000 has an image and no cap"):
        read_reference(tmp_path / "x.tar")


def test_images_of_a_shard_are_of_any_format(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", sample(0, kind="bmp") | sample(1, kind="tiff"))
    assert read_reference(tmp_path / "x.tar").images.load(0).mode == "RGB"
    # A mask beside an image.
    write_tar(tmp_path / "x.tar", {"00000.gif": b"mask"} | sample(0))
    assert read_reference(tmp_path / "x.tar").images.name(0).endswith("00000.jpg")


def test_a_caption_without_an_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", sample(0) | {"a/7.txt": b"seven"})
    with pytest.raises(InputError, match=r"^--reference: \S+x\.tar: a/7 has a caption and no imag"):
        read_reference(tmp_path / "x.tar")


def test_unreadable_images_are_refused_or_left_out(folder: Path) -> None:
    write_tar(folder / "cc-002.tar", {"9.jpg": b"no image", "9.txt": b"x"} | sample(8, "eight"))
    with pytest.raises(BadImage, match=r"cc-002\.tar:9\.jpg: "):
        read_reference(folder)
    reference = read_reference(folder, skip_bad_images=True)
    assert reference.skipped == (f"{folder / 'cc-002.tar'}:9.jpg",)
    assert len(reference) == 6 and reference.captions[-1] == "eight"
    # A shard may lose all of its images.
    write_tar(folder / "cc-001.tar", {"9.jpg": b"no image", "9.txt": b"x"})
    rest = read_reference(folder, skip_bad_images=True)
    assert [rest.images.name(i)[-9:] for i in (2, 3)] == ["00002.png", "00008.jpg"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], ""),
        # The header of the second file, a cut before it, and one after it.
        (lambda whole: spoiled(whole, 1), "no end of the archive"),
        (lambda whole: whole[: headers(whole)[2]], ""),
        (lambda whole: whole[: headers(whole)[2] + 100], ""),
        (lambda whole: b"\x1f\x8b" + whole, "gzip"),
        (lambda whole: b"no tar" * 200, ""),
        (lambda whole: whole.replace("grün".encode(), b"gr\xfc\xfcn"), "00000.txt"),
    ],
)
def test_damaged_shards(folder: Path, change: object, said: str) -> None:
    shard = folder / "cc-000.tar"
    shard.write_bytes(change(shard.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError, match=rf"^--reference: .*cc-000\.tar: .*{said}"):
        read_reference(folder)


def test_what_is_not_there_or_not_alone(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^--reference: .*cc-002\.tar: "):
        read_reference(folder / "cc-{000..002}.tar")
    (folder / "x.png").write_bytes(encoded(picture(0), "png"))
    with pytest.raises(InputError, match=r"cc-000\.tar"):
        read_reference(folder)
    write_tar(folder.parent / "empty.tar", {"0.json": b"{}"})
    with pytest.raises(InputError, match="^--reference: "):
        read_reference(folder.parent / "empty.tar")


@pytest.mark.parametrize("name", ["{}.tar", "{}.tar.gz"])
def test_images_with_the_same_bytes_are_found(tmp_path: Path, name: str) -> None:
    def flat(grey: int) -> bytes:
        return encoded(Image.new("RGB", (64, 64), (grey,) * 3), "ppm")

    one = flat(1)
    # As long as it, and with the same middle.
    like = one[:-1] + b"\x02"
    contents = [one, like, flat(3), one, encoded(picture(0), "png"), like, one]
    for shard, numbers in (("0", range(3)), ("1", range(3, 7))):
        files = {}
        for n in numbers:
            files |= {f"{n}.png": contents[n], f"{n}.txt": b"x"}
        write_tar(tmp_path / name.format(shard), files)
    images, _, _ = read_captioned_shards(find_shards(tmp_path), skip_bad_images=False)
    assert images.firsts() == [0, 1, 2, 0, 4, 1, 0]


def test_a_shard_that_goes_away(folder: Path) -> None:
    images = read_reference(folder).images
    (folder / "cc-000.tar").unlink()
    with pytest.raises(InputError, match=r"cc-000\.tar: "):
        images.load(0)
