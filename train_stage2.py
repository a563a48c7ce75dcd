"""Stage 2, text-conditional: `python train_stage2.py [overrides]`."""

from flowdit.train import stage2

if __name__ == "__main__":
    stage2()
