"""Stage 1, class-conditional: `python train_stage1.py [overrides]`."""

from flowdit.train import stage1

if __name__ == "__main__":
    stage1()
