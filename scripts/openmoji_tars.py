"""Write the embedded OpenMoji images as WebDataset tars, for the tutorial: captioned images of three shapes.

    python scripts/openmoji_tars.py data/tars

A sample is `0374.png`, `0374.txt` (the short caption) and `0374.json` (the long caption, licence and author). Besides
the single images, 64 x 64, there are pairs: two beside each other, 64 x 128 ("pear beside sun"), and one above the other,
128 x 64 ("pear above sun").
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flowdit.data import openmoji

TERMS = {"license": openmoji.LICENSE, "author": "OpenMoji"}


class Sample(NamedTuple):
    key: str
    pixels: UInt8[np.ndarray, "height width 3"]
    short: str
    long: str


def samples(seed: int) -> Iterator[Sample]:
    """Every image alone, beside another one, and above another one."""
    data = openmoji.load()
    rng = np.random.default_rng(seed)
    tiles, captions = data.tiles, data.captions
    for i, (short, long) in enumerate(captions):
        yield Sample(f"{i:04d}", tiles[i], short, long)
    for word, axis in (("beside", 1), ("above", 0)):
        for i, j in enumerate(rng.permutation(len(tiles)).tolist()):
            pixels = np.concatenate([tiles[i], tiles[j]], axis=axis)
            short, long = (f"{captions[i][k]} {word} {captions[j][k]}" for k in (0, 1))
            yield Sample(f"{i:04d}_{word}_{j:04d}", pixels, short, long)


def files(sample: Sample) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a sample."""
    image = io.BytesIO()
    Image.fromarray(sample.pixels).save(image, "PNG")
    yield f"{sample.key}.png", image.getvalue()
    yield f"{sample.key}.txt", sample.short.encode()
    yield f"{sample.key}.json", json.dumps({"long_caption": sample.long, **TERMS}, ensure_ascii=False).encode()


def write_tar(path: Path, part: list[Sample]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in (entry for sample in part for entry in files(sample)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the tars")
    parser.add_argument("--tars", type=int, default=8, help="number of tars")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of the order")
    args = parser.parse_args()
    everything = list(samples(args.seed))
    order = np.random.default_rng(args.seed).permutation(len(everything))
    args.out.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(order, args.tars)):
        write_tar(args.out / f"openmoji-{number:06d}.tar", [everything[i] for i in part.tolist()])
    print(f"{args.out}: {len(everything)} captioned images in {args.tars} tars")


if __name__ == "__main__":
    main()
