"""Images of other sizes than those of the training data."""

from pathlib import Path

import numpy as np
from PIL import Image
from runs import call

import flowdit
from flowdit import sample
from flowdit.inference.recipe import differences, read_recipe, redraw


def test_images_of_another_size(whole_run):
    settings = (f"checkpoint={whole_run / '6'}", "labels=[sun]", "solver=euler", "steps=2")
    assert call(sample.main, *settings, "image_size=[32,96]", "out=wide").status == 0
    (file,) = Path("wide").glob("0000*.png")
    assert Image.open(file).size == (96, 32)
    sampler = flowdit.load(str(whole_run / "6"))
    recipe = read_recipe(file.read_bytes())
    assert differences(recipe, sampler, recipe.batch) == ["an image of 32x96, here 64x64"]
    again = redraw(sampler.at_size(32, 96), recipe).images[0]
    np.testing.assert_array_equal(again, np.asarray(Image.open(file)))
    rule = "must be multiples of 16 pixels, the side of a patch, of at most 32768"
    for value, problem in (
        ("[32,40]", f"{rule}, got [32, 40]"),
        ("0", f"{rule}, got [0, 0]"),
        ("[1,2,3]", "must be null, a side or [height,width] in pixels, got [1, 2, 3]"),
    ):
        ended = call(sample.main, *settings, f"image_size={value}", "out=none")
        assert (ended.status, ended.err) == (2, f"error: image_size: {problem}\n")
