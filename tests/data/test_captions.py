"""The choice of captions, and the handling of empty and long ones."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from latent_records import word_encoder

from flowdit.data.captions import TokenizedCaptions, caption_key, choose_long, drop_tags


def records(*pairs):
    return [{"short_caption": short, "long_caption": long} for short, long in pairs]


def test_a_draw_below_the_probability_reads_the_long_caption():
    pairs = records(*[("w1", "w2")] * 4)
    assert choose_long(pairs, np.array([0.0, 0.29, 0.3, 0.99]), 0.3).tolist() == [True, True, False, False]
    assert not choose_long(pairs, np.zeros(4), 0.0).any()
    assert choose_long(pairs, np.full(4, np.nextafter(1, 0)), 1.0).all()


@pytest.mark.parametrize("draw", [0.0, 0.9])
def test_an_empty_caption_is_replaced_by_the_other_one(draw):
    text = TokenizedCaptions(word_encoder().tokenize, 0.5)
    batch = text.read([0, 1, 2], records(("w1", " \n"), ("", "w2"), (" ", "")), np.full(3, draw))
    assert batch["text_mask"].tolist() == [[True] + [False] * 3] * 2 + [[False] * 4]
    assert batch["text_ids"][:2, 0].tolist() == [2, 3]
    assert (batch["text_ids"].dtype, batch["text_mask"].dtype) == (np.int32, bool)


def test_tags_are_left_out_with_the_probability_and_the_same_draw_leaves_out_the_same():
    caption = "red apple, noto style, ripe"
    draws = np.random.default_rng(0).random(4000)
    dropped = [drop_tags(caption, draw, 0.2) for draw in draws]
    assert dropped == [drop_tags(caption, draw, 0.2) for draw in draws]
    assert all(text.startswith("red apple") for text in dropped)
    # The standard deviations over 4,000 draws are at most 0.007.
    for tag in (", noto style", ", ripe"):
        assert abs(np.mean([tag not in text for text in dropped]) - 0.2) < 0.03
    assert abs(np.mean([text == "red apple" for text in dropped]) - 0.04) < 0.015
    assert {drop_tags(caption, 0.3, 0.0), drop_tags(caption, 0.3, 1.0)} == {caption, "red apple"}


def test_the_reader_leaves_out_tags_of_the_chosen_caption():
    pair = records(("w1, w2", "w1, w2, w3")) * 200
    draws = np.random.default_rng(1).random(200)
    counts = {}
    for dropout in (0.0, 0.5, 1.0):
        batch = TokenizedCaptions(word_encoder().tokenize, 0.5, dropout).read(range(200), pair, draws)
        counts[dropout] = batch["text_mask"].sum(1)
    assert set(counts[0.0].tolist()) == {2, 3} and set(counts[1.0].tolist()) == {1}
    assert 1 < counts[0.5].mean() < counts[0.0].mean()


def test_truncated_captions_are_counted_over_all_threads():
    text = TokenizedCaptions(word_encoder(max_length=2).tokenize, 0.5)
    pairs = records(("w1 a b", "w2"), ("w1", "w2 a b c"), ("w1 a", "w2 a"))

    def read(_):
        text.read([0, 1, 2], pairs, np.array([0.9, 0.1, 0.1]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(200)))
    assert (text.counts.captions, text.counts.truncated) == (600, 400)


def test_the_key_of_captions_tells_where_one_ends():
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("ab", "d"), ("c", "ab")]
    keys = {caption_key(*pair) for pair in pairs} | {caption_key("abc"), caption_key("abd"), caption_key("")}
    assert len(keys) == len(pairs) + 3 and {len(key) for key in keys} == {8}
    assert caption_key("ab", "c") == caption_key("ab", "c")
