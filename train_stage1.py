"""Stage 1, class-conditional: `python train_stage1.py [overrides]`."""

from flowdit.cli import run

if __name__ == "__main__":
    run("train-stage1")
