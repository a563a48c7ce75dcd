"""`python -m flowdit.evaluate`: scores from a checkpoint, sweeps, going on after a kill, mistakes in one line."""

import json
import re
import shutil

import numpy as np
import pytest
from runs import call, finish, free_address, start, train_here
from test_generation import MEANS, WithoutLogits

import flowdit
from flowdit import features
from flowdit.evaluate import main
from flowdit.features.clip import Clip
from flowdit.scores import generation, prompts

QUICK = ("num_images=12", "steps=2", "solver=euler", "reference_split=all", "batch_size=8")


@pytest.fixture(autouse=True)
def mean_colours(monkeypatch):
    """Mean colours as the only feature network, as these tests are not about the features."""
    monkeypatch.setitem(features.LOADERS, "efficientnet", lambda weights: MEANS._replace(name="efficientnet"))


def evaluate(run, out, *settings: str):
    return call(main, f"checkpoint={run}", *QUICK, f"out={out}", f"cache={out}-cache", *settings)


def scores_of(out):
    return json.loads((out / "scores.json").read_text())


def test_scores_of_a_run_with_all_that_they_depend_on(whole_run, tmp_path):
    done = evaluate(whole_run, tmp_path / "scores")
    assert done.status == 0, done.err
    assert "step 6 of" in done.out and "12 images, classes with the frequencies of the data, seed 0" in done.out
    assert "56 images of" in done.out and "all split, decoded from latents" in done.out
    assert "efficientnet, real: 12 images of the reference against others" in done.out
    assert re.search(r"KID of 12 images, smoke figure: \S+ ± \S+ \(real images: \S+ ± \S+\)", done.out)
    content = scores_of(tmp_path / "scores")
    assert content["checkpoint"]["step"] == 6 and len(content["checkpoint"]["weights"]) == 16
    assert content["images"] | {"vae": ""} == {
        "count": 12,
        "seed": 0,
        "conditions": "classes with the frequencies of the data",
        "size": [64, 64],
        "vae": "",
    }
    assert content["reference"]["count"] == 56
    assert content["features"]["efficientnet"]["identity"] == MEANS.identity
    assert content["features"]["efficientnet"]["floor_count"] == 12
    assert content["compute"] == {"dtype": "float32", "devices": "4 x cpu", "processes": 1, "batch_size": 8}
    point = content["points"][0]
    assert point["settings"] == {
        "ema_width": None,
        "solver": "euler",
        "steps": 2,
        "interval": [0.0, 1.0],
        "internal_guidance": 1.0,
        "guidance": point["settings"]["guidance"],
    }
    assert point["evaluations"] == 2
    assert set(point["scores"]["efficientnet"]) == {"fd", "kid", "precision", "recall", "density", "coverage"}
    assert not (tmp_path / "scores" / "features").exists()


def test_a_sweep_marks_the_best_and_writes_its_sampler_into_the_checkpoint(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    out = tmp_path / "scores"
    settings = ("guidance=[1,4]", "interval=[[0,1],[0.25,0.5]]", "best=kid", "save_best=true")
    done = evaluate(run, out, *settings)
    assert done.status == 0, done.err
    content = scores_of(out)
    found = [(tuple(p["settings"]["interval"]), p["settings"]["guidance"]) for p in content["points"]]
    assert found == [((0, 1), 1), ((0, 1), 4), ((0.25, 0.5), 1), ((0.25, 0.5), 4)]
    values = [point["scores"]["efficientnet"]["kid"]["value"] for point in content["points"]]
    assert len(set(values)) > 1 and content["best"]["point"] == int(np.argmin(values))
    assert (out / "scores.png").is_file()
    best = content["points"][content["best"]["point"]]["settings"]
    rows = [line.split() for line in done.out.splitlines()]
    marked = [row for row in rows if row[:1] == ["best"]]
    assert len(marked) == 1 and f"{best['guidance']:g}" in marked[0]
    sampler = flowdit.load(str(run)).trained.config.train.sampler
    assert (sampler.guidance, sampler.steps) == (best["guidance"], 2)
    assert [sampler.guidance_low, sampler.guidance_high] == best["interval"]
    assert flowdit.load(str(whole_run)).trained.config.train.sampler.guidance == 2
    (run / "6" / "sampler.json").write_text('{"steps": 0}')
    with pytest.raises(ValueError, match=r"sampler.json: steps: must be at least 1, got 0"):
        flowdit.load(str(run))


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_digits(whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "PART_IMAGES", 8)
    assert evaluate(whole_run, tmp_path / "whole", "num_images=20").status == 0
    kept, drawn = generation.PartFiles._write, []

    def killed_after_a_part(files, part):
        kept(files, part)
        drawn.append(part.numbers)
        if len(drawn) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(generation.PartFiles, "_write", killed_after_a_part)
    assert evaluate(whole_run, tmp_path / "cut", "num_images=20").status == 130
    assert evaluate(whole_run, tmp_path / "cut", "num_images=20").status == 0
    assert drawn == [range(8), range(8, 16), range(16, 20)]
    assert scores_of(tmp_path / "cut")["points"] == scores_of(tmp_path / "whole")["points"]
    monkeypatch.setattr(generation, "draw_features", lambda *_: pytest.fail("all points are stored"))
    assert evaluate(whole_run, tmp_path / "cut", "num_images=20").status == 0
    assert scores_of(tmp_path / "cut")["points"] == scores_of(tmp_path / "whole")["points"]


def test_classes_and_images_as_asked(whole_run, tmp_path):
    out = tmp_path / "scores"
    done = evaluate(whole_run, out, "labels=[sun,cat]", "metrics=fd", "save_images=true", "num_images=4")
    assert done.status == 0 and "2 given classes" in done.out
    images = sorted((out / "images").rglob("*.png"))
    assert [image.name for image in images] == [f"{i:06d}.png" for i in range(4)]
    assert evaluate(whole_run, out, "labels=balanced", "metrics=fd", "num_images=4").status == 0
    assert scores_of(out)["images"]["conditions"] == "as many images of each class"


def test_prompts_of_a_text_model(whole_text_run, tmp_path):
    out = tmp_path / "scores"
    done = evaluate(whole_text_run, out, "metrics=[fd,kid]")
    assert done.status == 0, done.err
    assert "captions of the reference" in done.out
    (tmp_path / "prompts.txt").write_text("red apple\n\na sun\n")
    done = evaluate(whole_text_run, out, "metrics=fd", f"prompts_file={tmp_path / 'prompts.txt'}", "num_images=4")
    assert done.status == 0 and "2 given prompts" in done.out


@pytest.mark.slow
def test_clip_score_beside_that_of_real_images(whole_text_run, tmp_path, monkeypatch):
    texts = lambda prompts: np.asarray([[len(prompt), 1, 1, 1, 1, 1] for prompt in prompts], np.float32)
    clip = Clip(MEANS._replace(name="clip", num_classes=0), texts)
    monkeypatch.setitem(features.LOADERS, "clip", lambda weights: clip.image)
    monkeypatch.setattr("flowdit.scores.comparison.load_clip", lambda weights: clip)
    done = evaluate(whole_text_run, tmp_path / "scores", "features=[efficientnet,clip]", "metrics=[fd,clip_score]")
    assert done.status == 0, done.err
    assert re.search(r"CLIP score of 12 images, smoke figure: \S+ ± \S+ \(real images: \S+ ± \S+\)", done.out)
    found = scores_of(tmp_path / "scores")["points"][0]["scores"]
    assert set(found["clip"]) == {"fd", "clip_score"} and set(found["efficientnet"]) == {"fd"}
    done = evaluate(whole_text_run, tmp_path / "scores", "metrics=clip_score")
    assert done.err == "error: metrics: clip_score needs CLIP among the features (features=clip weights.clip=...)\n"


@pytest.mark.slow
def test_the_best_may_be_by_a_score_that_only_the_second_space_has(whole_run, tmp_path, monkeypatch):
    without = MEANS._replace(name="dinov2", num_classes=0, model=WithoutLogits())
    monkeypatch.setitem(features.LOADERS, "dinov2", lambda weights: without)
    settings = ("features=[dinov2,efficientnet]", "metrics=[fd,inception_score]", "best=inception_score")
    done = evaluate(whole_run, tmp_path / "scores", *settings, "guidance=[1,4]", "num_images=100")
    assert done.status == 0, done.err
    content = scores_of(tmp_path / "scores")
    assert (content["best"]["features"], content["best"]["metric"]) == ("efficientnet", "inception_score")
    assert set(content["points"][0]["scores"]["dinov2"]) == {"fd"} and (tmp_path / "scores" / "scores.png").is_file()


@pytest.mark.slow
def test_prompt_following_by_kind_of_word(whole_text_run, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MIN_PER_WORD", 2)
    monkeypatch.setattr(prompts, "MIN_PROMPTS", 2)
    done = evaluate(whole_text_run, tmp_path / "scores", "metrics=[prompt_following]", "best=prompt_following")
    assert done.status == 0, done.err
    assert "prompt_following/colour is left out: fewer than 2 words of it have 2 captions" in done.out
    assert re.search(r"prompt_following/object in efficientnet: \d words, chance 0\.\d+", done.out)
    assert set(scores_of(tmp_path / "scores")["points"][0]["scores"]["efficientnet"]) == {"prompt_following/object"}
    monkeypatch.setattr(prompts, "MIN_PER_WORD", 100)
    done = evaluate(whole_text_run, tmp_path / "scores", "metrics=[prompt_following]")
    assert "error: metrics: prompt_following needs a reference of images with captions" in done.err


@pytest.mark.slow
def test_a_guide_and_another_width_of_the_average_are_points_of_their_own(whole_run, tiny_data, tmp_path):
    run = tmp_path / "averaged"
    assert train_here(tiny_data, run, "train.ema_snapshot_every=2", "train.num_steps=6").status == 0
    out = tmp_path / "scores"
    done = evaluate(run, out, "metrics=fd", "ema_width=[null,0.05]", f"guide={whole_run / '2'}", "guidance=2")
    assert done.status == 0, done.err
    assert f"guided by {whole_run / '2'}" in done.out
    points = scores_of(out)["points"]
    assert [point["settings"]["ema_width"] for point in points] == [None, 0.05]
    assert len({point["scores"]["efficientnet"]["fd"]["value"] for point in points}) == 2
    assert scores_of(out)["checkpoint"]["guide"] == str(whole_run / "2")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (("ema_width=[null,0.1]",), "ema_width: "),
        (("guide=nowhere",), "guide: must be a file, a folder or "),
        (("metrics=fid",), "metrics: must be one of fd, kid, "),
        (("features=vgg",), "features: must be one of efficientnet"),
        (("num_images=4", "metrics=kid"), "num_images: must be at least 10 for kid, got 4"),
        (("metrics=clip_score",), "metrics: clip_score must be of a model that draws from prompts"),
        (("reference_split=validation", "metrics=kid"), "reference: must have at least 10 images for kid, got 8"),
        (("reference=nowhere",), "reference: "),
        (("reference_split=test",), "reference_split: must be one of "),
        (("where=noto",), "where: must be null or values by column, such as {style: noto}, got 'noto'"),
        (("where={style:noto,number:[1,2]}",), "where: must name columns that the all split of "),
        (("where={subject:23E9}",), "where: must have texts and whole numbers: put others in quotes, as in 'where={"),
        (("where={style:[noto,true]}",), "where: must have texts and whole numbers: put others in quotes"),
        (('where={subject:"23E9"}',), "where: must name columns that the all split of "),
        (("guidance=strong",), "guidance: must be a number or a list of numbers, got 'strong'"),
        (("interval=[0.5,0.1]",), "guidance_low/guidance_high: must satisfy 0 <= low <= high <= 1"),
        (("interval=0.5",), "interval: must be [low,high], or a list of such pairs, got [0.5]"),
        (("steps=[2,2]",), "steps: must be different values, got [2, 2]"),
        (("labels=[moon]",), "labels: must be in [0, 4) or a class name (cat, dog, heart, sun), got 'moon'"),
        (("prompts=[red apple]",), "prompts: not supported by this model, which takes labels"),
        (("best=kid", "metrics=fd"), "best: must be one of fd, got 'kid'"),
        (("metrics=[]",), "metrics: must be one or more of fd, kid, "),
        (("guide=x", "negative_prompt=blue"), "negative_prompt: must not be given with a guide, which replaces it"),
    ],
)
def test_a_mistake_is_one_line_before_any_image(whole_run, tmp_path, settings, error, monkeypatch):
    monkeypatch.setattr(generation, "draw_features", lambda *_: pytest.fail("an image was drawn"))
    done = evaluate(whole_run, tmp_path / "scores", *settings)
    assert done.status == 2 and done.err.startswith(f"error: {error}"), done.err
    assert done.err.count("\n") == 1 and not (tmp_path / "scores").exists()


def test_the_data_of_the_run_must_be_there(whole_run, tmp_path, monkeypatch):
    run = shutil.copytree(whole_run / "6", tmp_path / "step")
    sampler = flowdit.load(str(run))
    sampler.trained.config.data.path = "moved/data"
    monkeypatch.setattr("flowdit.evaluate.load", lambda *_, **__: sampler)
    done = evaluate(run, tmp_path / "scores")
    rule = "data is the data set of the run, which is not there: give its new place, or other images"
    assert (done.status, done.err) == (2, f"error: reference: {rule}, got 'moved/data'\n")


def test_statistics_of_another_network_are_refused(whole_run, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    done = evaluate(whole_run, tmp_path / "scores", f"reference={tmp_path / 'statistics.npz'}", "labels=balanced")
    assert done.status == 2 and done.err.startswith("error: features: must be inception alone"), done.err


@pytest.mark.slow
def test_two_processes_score_like_one(whole_run, tmp_path):
    settings = (f"checkpoint={whole_run}", *QUICK, "metrics=[fd,kid]", f"cache={tmp_path / 'cache'}")
    outs = []
    for count in (1, 2):
        outs.append(tmp_path / str(count))
        mesh = () if count == 1 else (f"mesh.coordinator={free_address()}", f"mesh.num_processes={count}")
        command = ("-m", "flowdit.evaluate", *settings, f"out={outs[-1]}", *mesh)
        processes = [start(*command, *([f"mesh.process_id={i}"] if mesh else [])) for i in range(count)]
        finished = [finish(process) for process in processes]
        assert [process.status for process in finished] == [0] * count, finished
    one, two = (scores_of(out)["points"][0]["scores"]["efficientnet"] for out in outs)
    assert one["fd"]["value"] == pytest.approx(two["fd"]["value"], rel=1e-3)
    assert scores_of(outs[1])["compute"]["processes"] == 2
