"""Console output: commands print the messages of all modules, library calls print nothing."""

import logging
import shutil
import sys

import pytest
from PIL import Image
from runs import finish, start
from tqdm import tqdm

from flowdit.command import messages_on_stdout, tell_processes_apart

LIBRARY = """
import sys
import flowdit
from flowdit.data.prepare import PrepareConfig, prepare

checkpoint, images, out = sys.argv[1:]
for _ in flowdit.load(checkpoint).draw(prompts=["a red apple"], steps=1, guidance=1.0):
    pass
prepare(PrepareConfig(source=images, out=out, image_size=16, vae_check=0))
"""
logger = logging.getLogger("flowdit.some.module")


def test_the_library_prints_nothing(whole_text_run, tmp_path):
    """Neither messages nor progress bars."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "1.png")
    out = tmp_path / "out"
    finished = finish(start("-c", LIBRARY, str(whole_text_run / "6"), str(tmp_path / "images"), str(out)))
    assert finished == (0, "", "")
    assert (out / "dataset.json").is_file()


def test_a_program_gets_the_messages_by_logging(whole_text_run, tmp_path):
    import flowdit

    run = shutil.copytree(whole_text_run, tmp_path / "run")
    (run / "6" / "checksums.json").unlink()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("flowdit").addHandler(handler)
    try:
        list(flowdit.load(str(run)).draw(prompts=["a red apple and " * 20], steps=1, guidance=1.0))
    finally:
        logging.getLogger("flowdit").removeHandler(handler)
    damaged, cut = (record.getMessage() for record in records)
    assert damaged.startswith(f"checkpoint {run / '6'} is damaged and skipped: ")
    assert cut.startswith("longer than 32 tokens, the rest is ignored: 'a red apple and a red")
    assert {record.levelno for record in records} == {logging.WARNING}


def test_a_command_prints_information_plainly_and_warnings_as_such(capsys):
    logger.warning("before")
    with messages_on_stdout():
        logger.debug("details")
        logger.info("step %d  41%% MFU", 3)
        logger.warning("no such file")
    logger.warning("after")
    assert capsys.readouterr() == ("step 3  41% MFU\nwarning: no such file\n", "")


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_of_several_processes_prints_information(capsys, process):
    with messages_on_stdout():
        tell_processes_apart(process, 2)
        logger.info("step 3")
        logger.warning("disk full")
    assert capsys.readouterr().out == ("step 3\n", "")[process] + f"warning: process {process}: disk full\n"
    with messages_on_stdout():
        logger.info("a process alone")
    assert capsys.readouterr().out == "a process alone\n"


def test_a_progress_bar_stays_below_the_messages(capsys):
    with messages_on_stdout(), tqdm(total=2, file=sys.stderr, mininterval=0) as bar:
        bar.update()
        capsys.readouterr()
        logger.info("halfway")
        out, err = capsys.readouterr()
    assert out == "halfway\n"
    cleared, drawn = err.strip("\r").split("\r")[0], err.split("\r")[-1]
    assert cleared.strip() == "" and "1/2" in drawn


def test_a_closed_console_does_not_end_a_command(monkeypatch):
    for name in ("/dev/full", "closed"):
        stream = open("/dev/full" if name == "/dev/full" else "closed", "w")  # noqa: SIM115
        if name == "closed":
            stream.close()
        with monkeypatch.context() as patch, messages_on_stdout():
            patch.setattr(sys, "stdout", stream)
            logger.info("lost")
