"""Miniatures of the eight unlabelled sets of the papers, in their own names and containers.

Each writer returns what packing has to give: {key: bytes of the image}, and {key: kind of reason} for what is dropped.
"""

import gzip
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

Wanted = tuple[dict[str, bytes], dict[str, str]]


def picture(seed: int, *, size: tuple[int, int] = (40, 30), mode: str = "RGB", format: str = "JPEG") -> bytes:
    """An encoded picture, another one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def put(root: Path, files: Mapping[str, bytes]) -> None:
    """Writes files, with their folders."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def tar_of(files: Mapping[str, bytes], *, format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of some files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_bdd100k(root: Path) -> Wanted:
    """Stills of both releases; the maps beside them are no photos. Videos have a test of their own."""
    stills = {
        "images/100k/train/0000f77c-6257be58.jpg": picture(1),
        "images/100k/val/b1c66a42-6f7d68ca.jpg": picture(2),
        "images/10k/train/00d79c0a-23bea078.jpg": picture(3),
        "images/10k/test/ac6d4f42-00000000.jpg": picture(1),  # in both releases
    }
    put(root / "bdd100k", stills)
    put(root / "bdd100k", {"labels/drivable/masks/train/0000f77c-6257be58.png": picture(9, format="PNG", mode="L")})
    put(root / "bdd100k", {"labels/det_20/det_train.json": b"[]"})
    keys = {f"bdd100k/bdd100k/{name.removesuffix('.jpg')}_jpg": data for name, data in stills.items()}
    copy = "bdd100k/bdd100k/images/10k/test/ac6d4f42-00000000_jpg"
    return {key: data for key, data in keys.items() if key != copy}, {copy: "duplicate"}


def write_landmarks_v2(root: Path) -> Wanted:
    """One tar as it is downloaded and one that is unpacked."""
    unpacked = {f"train/0/0/{c}/00{c}0123456789abc.jpg": picture(seed) for seed, c in enumerate("0af")}
    packed = {"1/2/3/123456789abcdef0.jpg": picture(10), "f/f/f/fff0000000000000.jpg": picture(11, mode="L")}
    put(root, unpacked)
    put(root, {"images_007.tar": tar_of(packed), "train.csv": b"id,url,landmark_id\n"})
    keys = {f"landmarks_v2/{name.removesuffix('.jpg')}_jpg": data for name, data in unpacked.items()}
    return keys | {f"landmarks_v2/images_007_tar/{n.removesuffix('.jpg')}_jpg": d for n, d in packed.items()}, {}


def write_imagenet21k(root: Path) -> Wanted:
    """A tar for each synset and one unpacked; CMYK, PNG under the name .JPEG, a damaged file."""
    tars = {
        "n01440764": {
            "n01440764_10026.JPEG": picture(1),
            "n01440764_10027.JPEG": picture(2, mode="CMYK"),
            "n01440764_10029.JPEG": picture(3, format="PNG", mode="RGBA"),
        },
        "n02119789": {"n02119789_1.JPEG": picture(4)[:-40], "n02119789_2.JPEG": picture(5)},
    }
    folder = {"n03000001/n03000001_12.JPEG": picture(6)}
    put(root, folder)
    put(root, {f"winter21_whole/{name}.tar": tar_of(files) for name, files in tars.items()})
    keys = {f"imagenet21k/{name.removesuffix('.JPEG')}_JPEG": data for name, data in folder.items()}
    for name, files in tars.items():
        there = {f"imagenet21k/winter21_whole/{name}_tar/{n.removesuffix('.JPEG')}_JPEG": d for n, d in files.items()}
        keys |= there
    damaged = "imagenet21k/winter21_whole/n02119789_tar/n02119789_1_JPEG"
    return {key: data for key, data in keys.items() if key != damaged}, {damaged: "undecodable"}


def write_lmdb(folder: Path, values: Mapping[str, bytes]) -> None:
    """An LMDB folder as LSUN has them."""
    import lmdb

    folder.mkdir(parents=True)
    environment = lmdb.open(str(folder), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    environment.close()


def write_lsun(root: Path) -> Wanted:
    """Two categories; WebP and JPEG values; one that is no image."""
    bedroom = {f"{seed:040x}": picture(seed, format="WEBP" if seed % 2 else "JPEG") for seed in range(1, 5)}
    write_lmdb(root / "bedroom_train_lmdb", bedroom | {f"{9:040x}": b"no image"})
    church = {f"{seed:040x}": picture(seed + 20) for seed in range(1, 3)}
    write_lmdb(root / "church_outdoor_val_lmdb", church)
    put(root, {"bedroom_train_lmdb.zip": b"PK"})

    def keys(folder: str, values: Mapping[str, bytes]) -> dict[str, bytes]:
        suffix = {b"R": "webp", b"\xff": "jpg"}
        return {f"lsun/{folder}/{key}_{suffix[data[:1]]}": data for key, data in values.items()}

    wanted = keys("bedroom_train_lmdb", bedroom) | keys("church_outdoor_val_lmdb", church)
    return wanted, {f"lsun/bedroom_train_lmdb/{9:040x}_bin": "undecodable"}


def write_objects365(root: Path) -> Wanted:
    """A gzipped patch as it is downloaded and one that is unpacked."""
    patch = {f"patch0/objects365_v1_{i:08d}.jpg": picture(i) for i in range(1, 5)}
    unpacked = {f"images/train/patch16/objects365_v2_{i:08d}.jpg": picture(i) for i in range(908726, 908728)}
    put(root, unpacked)
    put(root, {"patch0.tar.gz": gzip.compress(tar_of(patch)), "zhiyuan_objv2_train.json": b"{}"})
    keys = {f"objects365/{name.removesuffix('.jpg')}_jpg": data for name, data in unpacked.items()}
    return keys | {f"objects365/patch0_tar_gz/{n.removesuffix('.jpg')}_jpg": d for n, d in patch.items()}, {}


def write_openimages_v7(root: Path) -> Wanted:
    """One of the sixteen archives, one unpacked; validation is not taken; a file of no bytes."""
    archive = {f"train_0/0000{i:012x}.jpg": picture(i) for i in range(1, 4)}
    unpacked = {"train_f/f00000000000000a.jpg": picture(9), "train_f/f00000000000000b.jpg": b""}
    put(root, unpacked)
    put(root, {"train_0.tar.gz": gzip.compress(tar_of(archive))})
    put(root, {"validation.tar.gz": gzip.compress(tar_of({"validation/0001eeaf4aed83f9.jpg": picture(30)}))})
    keys = {f"openimages_v7/train_0_tar_gz/{name.removesuffix('.jpg')}_jpg": data for name, data in archive.items()}
    keys["openimages_v7/train_f/f00000000000000a_jpg"] = picture(9)
    return keys, {"openimages_v7/train_f/f00000000000000b_jpg": "undecodable"}


def write_places365(root: Path) -> Wanted:
    """Standard unpacked, classes of one and two levels, challenge as a tar, val; one image below the least side."""
    unpacked = {
        "data_large_standard/a/airfield/00000001.jpg": picture(1),
        "data_large_standard/a/apartment_building/outdoor/00000001.jpg": picture(2),
        "val_large/Places365_val_00000001.jpg": picture(3),
    }
    challenge = {"data_large/a/airfield/00000001.jpg": picture(4), "data_large/z/zen_garden/00000002.jpg": picture(5)}
    put(root, unpacked | {"data_large_standard/b/bakery/00000007.jpg": picture(8, size=(40, 8))})
    put(root, {"train_large_places365challenge.tar": tar_of(challenge), "places365_val.txt": b""})
    keys = {f"places365/{name.removesuffix('.jpg')}_jpg": data for name, data in unpacked.items()}
    prefix = "places365/train_large_places365challenge_tar"
    keys |= {f"{prefix}/{name.removesuffix('.jpg')}_jpg": data for name, data in challenge.items()}
    return keys, {"places365/data_large_standard/b/bakery/00000007_jpg": "tiny"}


def write_sa1b(root: Path) -> Wanted:
    """Flat members with a leading "./", masks between the images, one truncated image."""
    wanted: dict[str, bytes] = {}
    for number, ids in enumerate([(223750, 10000139, 5), (7, 1112)]):
        files: dict[str, bytes] = {}
        for i in ids:
            files[f"./sa_{i}.jpg"] = picture(i) if i != 5 else picture(i)[:-30]
            files[f"./sa_{i}.json"] = b'{"image": {}, "annotations": []}'
            wanted[f"sa1b/sa_{number:06d}_tar/sa_{i}_jpg"] = files[f"./sa_{i}.jpg"]
        put(root, {f"sa_{number:06d}.tar": tar_of(files)})
    damaged = "sa1b/sa_000000_tar/sa_5_jpg"
    return {key: data for key, data in wanted.items() if key != damaged}, {damaged: "undecodable"}


WRITERS: dict[str, Callable[[Path], Wanted]] = {
    "bdd100k": write_bdd100k,
    "imagenet21k": write_imagenet21k,
    "landmarks_v2": write_landmarks_v2,
    "lsun": write_lsun,
    "objects365": write_objects365,
    "openimages_v7": write_openimages_v7,
    "places365": write_places365,
    "sa1b": write_sa1b,
}
