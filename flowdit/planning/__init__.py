"""What a training step costs on machines that are not there: `python -m flowdit.plan`."""
