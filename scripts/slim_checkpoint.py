"""Cut a checkpoint down to its EMA weights in float16 and its metadata: it samples, it does not resume.

    python scripts/slim_checkpoint.py checkpoints/<step> pretrained/<name>

How `pretrained/openmoji` was made.
"""

import argparse
from pathlib import Path

from flowdit.training.checkpoint import read_meta, save_slim
from flowdit.training.trained import load_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    save_slim(args.target, load_trained(args.checkpoint).model, read_meta(args.checkpoint))
    size = sum(path.stat().st_size for path in args.target.rglob("*") if path.is_file())
    print(f"{args.target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
