"""Write `near_duplicates.json` of the emoji in eight styles: the pairs of pictures that are nearly the same.

    python scripts/emoji_near_duplicates.py [assets/emoji_styles]

Nearly the same: a root-mean-square difference of at most 0.04 (values in [0, 1]) between the means of 2x2 pixels.
"""

import json
import sys
from pathlib import Path

import numpy as np

from flowdit.data.emoji_styles import FOLDER, STYLES, drawn_styles, load_sheet

LIMIT = 0.04
CHUNK = 1_000


def main(folder: Path) -> None:
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    sheets = {style: load_sheet(style, folder) for style in STYLES}
    names = [(style, row) for row in table for style in drawn_styles(row)]
    keys = [f"{style}/{row['hexcode']}" for style, row in names]
    tiles = np.stack([sheets[style][row["tiles"][style]] for style, row in names])
    halves = tiles.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4), dtype=np.float32).reshape(len(tiles), -1) / 255
    squares = np.square(halves).sum(1)
    pairs = []
    for start in range(0, len(halves), CHUNK):
        part = slice(start, start + CHUNK)
        distances = squares[part, None] + squares[None] - 2 * halves[part] @ halves.T
        near = np.argwhere(distances <= LIMIT**2 * halves.shape[1]) + (start, 0)
        pairs += [[keys[first], keys[second]] for first, second in near if first < second]
    text = ",\n".join(json.dumps(pair) for pair in sorted(pairs))
    (folder / "near_duplicates.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    print(f"{len(pairs)} pairs among {len(keys)} pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
