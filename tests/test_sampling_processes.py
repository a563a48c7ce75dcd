"""`flowdit.sample` as several processes."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import call, finish, free_address, start

from flowdit.sample import main


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(whole_text_run, tmp_path):
    settings = (f"checkpoint={whole_text_run}", "num_images=3", "steps=2", "prompts=[red apple]", "overwrite=true")
    assert call(main, *settings, f"out={tmp_path / 'one'}").status == 0
    mesh = (f"mesh.coordinator={free_address()}", "mesh.num_processes=2")
    command = ("-m", "flowdit.sample", *settings, f"out={tmp_path / 'two'}", *mesh)
    pair = [start(*command, f"mesh.process_id={i}") for i in (0, 1)]
    finished = [finish(process) for process in pair]
    assert [process.status for process in finished] == [0, 0], finished
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 5 and names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        if name.endswith(".png"):
            one, two = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
            assert np.abs(one - two).max() <= 1, name
    assert json.loads((tmp_path / "two" / "samples.json").read_text())["settings"]["num_images"] == 3
    assert "samples: " in finished[0].out and "samples: " not in finished[1].out
