"""Stage 2, text-conditional: `python train_stage2.py [overrides]`."""

from flowdit.cli import run

if __name__ == "__main__":
    run("train-stage2")
