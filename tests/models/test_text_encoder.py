"""From texts to tokens and features: padding, truncation, the encoders, and errors for invalid folders."""

import dataclasses
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from text_folders import build_tokenizer, write_t5gemma

from flowdit import sharding
from flowdit.models import text_encoder
from flowdit.models.text_encoder import TextConfig, encode_tokens, load_text_encoder

TEXTS = ["a red apple", "", "red", " \n\t", "a flag with 世界 on it"]


def config_of(encoder, max_length=40, dtype="float32"):
    return TextConfig(str(encoder), max_length, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_t5gemma(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(config_of(folder))


@pytest.fixture(scope="module")
def words():
    return load_text_encoder(config_of("wordllama"))


def expected_ids(text):
    tokenizer = build_tokenizer()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer.encode(text).ids


def test_tokens_are_the_tokenizers_own_padded_on_the_right(encoder):
    tokens = encoder.tokenize(["a red apple", "a 世"])
    assert tokens.ids.shape == tokens.mask.shape == (2, 40)
    assert tokens.ids.dtype == np.int32
    for text, ids, mask in zip(["a red apple", "a 世"], tokens.ids, tokens.mask, strict=True):
        expected = expected_ids(text)
        assert ids[: len(expected)].tolist() == expected
        assert mask.tolist() == [True] * len(expected) + [False] * (40 - len(expected))
        assert not ids[len(expected) :].any()
    assert tokens.ids[0, 0] == 2  # <bos>
    assert {expected_ids("世")[i] - 4 for i in (-3, -2, -1)} == {
        0xE4,
        0xB8,
        0x96,
    }  # bytes of a word that is not a token
    assert not tokens.truncated.any()


@pytest.mark.parametrize("kind", ["encoder", "words"])
def test_blank_texts_have_no_token(kind, request):
    tokens = request.getfixturevalue(kind).tokenize(["", "  \n\t", "red"])
    assert tokens.mask.any(1).tolist() == [False, False, True]
    assert not tokens.ids[:2].any()
    assert not tokens.truncated.any()


def test_truncated_texts_are_flagged_and_keep_their_special_tokens(encoder):
    text = "red apple"
    length = len(expected_ids(text))
    exact, short = encoder.tokenize([text], length), encoder.tokenize([text, "a"], length - 1)
    assert exact.mask.all() and not exact.truncated.any()
    assert short.ids[0].tolist() == expected_ids(text)[:-1]
    assert short.truncated.tolist() == [True, False]


def test_end_token_survives_truncation(folder, tmp_path):
    write_t5gemma(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["post_processor"]["single"].append({"SpecialToken": {"id": "<eos>", "type_id": 0}})
    raw["post_processor"]["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokens = load_text_encoder(config_of(tmp_path)).tokenize(["abcdefgh"], 5)
    assert tokens.ids[0].tolist() == [2, *expected_ids("abc")[1:], 1]
    assert tokens.truncated.all()


def test_truncated_features_are_those_of_the_cut_text(folder):
    encoder = load_text_encoder(config_of(folder, max_length=6))
    whole = encoder.encode(["abcdefghij", "abcde"])
    assert whole.truncated.tolist() == [True, False]
    np.testing.assert_array_equal(whole.features[0], whole.features[1])


def test_threads_share_an_encoder(encoder):
    texts = [f"red {chr(97 + i % 26) * (i % 30)}" for i in range(200)]
    lengths = [8 + i % 3 for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text, length: encoder.tokenize([text], length), texts, lengths))
    for text, length, tokens in zip(texts, lengths, found, strict=True):
        expected = expected_ids(text)
        assert tokens.ids[0][tokens.mask[0]].tolist() == expected[:length]
        assert tokens.truncated[0] == (len(expected) > length)


def test_padded_lengths_are_few_and_sufficient(encoder):
    lengths = {n: encoder.encode(["b" * n]).features.shape[1] for n in (0, 1, 15, 16, 31, 32, 39, 60)}
    assert lengths == {0: 16, 1: 16, 15: 16, 16: 32, 31: 32, 32: 40, 39: 40, 60: 40}


def test_features_do_not_depend_on_length_or_other_texts(encoder):
    alone = encoder.encode(["a red apple"])
    among = encoder.encode(["a red apple", "", "b" * 35])
    assert (alone.features.shape[1], among.features.shape[1]) == (16, 40)
    kept = alone.mask[0]
    np.testing.assert_array_equal(among.mask[0], np.pad(kept, (0, 24)))
    np.testing.assert_allclose(among.features[0, :16][kept], alone.features[0][kept], atol=1e-5)
    assert np.isfinite(among.features).all()


def test_encode_agrees_with_the_network_on_tokens(encoder):
    tokens, out = encoder.tokenize(TEXTS, 16), encoder.encode(TEXTS)
    one = encoder.network(jnp.asarray(tokens.ids[0]), jnp.asarray(tokens.mask[0]))
    np.testing.assert_allclose(out.features[0, :16][out.mask[0, :16]], one[tokens.mask[0]], atol=1e-5)
    jitted = jax.jit(lambda ids, mask: encode_tokens(encoder.network, ids, mask))(tokens.ids, tokens.mask)
    np.testing.assert_allclose(jitted[0], one, atol=1e-5)


def test_many_texts_are_encoded_in_batches_of_one_shape(encoder, monkeypatch):
    shapes = []

    def spy(network, ids, mask):
        shapes.append(ids.shape)
        return encode_tokens(network, ids, mask)

    texts = ["abcdefghijklmnopqrstuvwxyz"[i % 26] * (i % 12) for i in range(70)]
    expected = np.concatenate([encoder.encode([text]).features for text in texts[60:]])
    monkeypatch.setattr(text_encoder, "encode_tokens", spy)
    out = encoder.encode(texts)
    assert shapes == [(32, 16)] * 3
    assert out.features.shape == (70, 16, 48)
    mask = out.mask[60:]
    np.testing.assert_allclose(out.features[60:][mask], expected[mask], atol=1e-5)


def test_no_texts_give_no_features(encoder):
    out = encoder.encode([])
    assert out.features.shape == (0, 16, 48)
    assert out.mask.shape == (0, 16)


def test_bfloat16_features_stay_bfloat16(folder, encoder):
    rough = load_text_encoder(config_of(folder, dtype="bfloat16"))
    out, exact = rough.encode(TEXTS), encoder.encode(TEXTS)
    assert out.features.dtype == jnp.bfloat16
    assert (rough.dtype, rough.fingerprint) == ("bfloat16", encoder.fingerprint)
    error = np.abs(out.features.astype(np.float32) - exact.features)[exact.mask].mean()
    assert error < 0.03 * np.abs(exact.features[exact.mask]).mean()


def test_wordllama_looks_its_table_up(words):
    spec = importlib.util.find_spec("wordllama")
    table = safetensors.numpy.load_file(f"{spec.submodule_search_locations[0]}/weights/l2_supercat_256.safetensors")
    out = words.encode(["a red apple", "red"])
    tokens = words.tokenize(["a red apple", "red"])
    pieces = [words.tokenizer.id_to_token(i) for i in tokens.ids[0][tokens.mask[0]]]
    assert pieces == ["▁a", "▁red", "▁apple"]  # words only, without "<s>"
    np.testing.assert_array_equal(out.features[0, :3], table["embedding.weight"][tokens.ids[0, :3]].astype(np.float32))
    np.testing.assert_array_equal(out.features[1, 0], out.features[0, 1])
    assert words.width == out.features.shape[-1] == 256
    assert words.tokenize(["a red apple"], 2).truncated.all()


def test_wordllama_is_not_imported(words):
    assert "wordllama" not in sys.modules


@pytest.mark.parametrize("name", ["wordllama", "t5gemma"])
def test_weights_are_laid_out_on_a_mesh(folder, encoder, words, name):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))
    alone = {"wordllama": words, "t5gemma": encoder}[name]
    sharded = load_text_encoder(config_of(alone.name), mesh)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(sharded.network))
    out, expected = sharded.encode(TEXTS), alone.encode(TEXTS)
    np.testing.assert_allclose(out.features[out.mask], expected.features[out.mask], atol=1e-5)


def test_fingerprint_covers_the_tokenizer(encoder, tmp_path):
    write_t5gemma(tmp_path)
    assert load_text_encoder(config_of(tmp_path)).fingerprint == encoder.fingerprint
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"content": "▁"', '"content": "a"'))
    assert load_text_encoder(config_of(tmp_path)).fingerprint != encoder.fingerprint
    assert len(encoder.fingerprint) == 16 and int(encoder.fingerprint, 16) >= 0


def load_error(config):
    """The one-line error of `load_text_encoder`."""
    with pytest.raises(ValueError) as caught:
        load_text_encoder(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": " "}, "encoder: must be 'wordllama', a folder or a hub id, got ' '"),
        ({"max_length": 0}, "max_length: must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: must be one of bfloat16, float32, got 'int8'"),
    ],
)
def test_config_is_checked_by_field(changes, message):
    TextConfig().check()
    assert message in load_error(dataclasses.replace(TextConfig(), **changes))


def test_no_room_beside_special_tokens(folder):
    message = load_error(config_of(folder, max_length=1))
    assert message == "max_length: must be above the 1 special tokens, got 1"


@pytest.mark.parametrize(
    "content", [None, b"{", b'{"model": 3}', b"\xff\xfe"], ids=["missing", "cut", "foreign", "binary"]
)
def test_missing_or_damaged_tokenizer(tmp_path, content):
    write_t5gemma(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.unlink() if content is None else file.write_bytes(content)
    expected = f"{tmp_path}: must hold tokenizer.json" if content is None else f"{file}: not a readable tokenizer"
    assert load_error(config_of(tmp_path)).startswith(f"encoder: {expected}")


def test_tokenizer_of_a_larger_network(tmp_path):
    write_t5gemma(tmp_path, vocab_size=100)
    assert load_error(config_of(tmp_path)).startswith(
        f"encoder: {tmp_path}: tokenizer.json must have ids below vocab_size=100, not 291"
    )


def test_other_architecture(tmp_path):
    write_t5gemma(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    found = "must be a T5Gemma checkpoint (model_type t5gemma), found model_type 'bert'"
    assert load_error(config_of(tmp_path)) == f"encoder: {tmp_path}: {found}"


def test_incomplete_weights(tmp_path):
    write_t5gemma(tmp_path, num_shards=3)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    lost = {key: file for key, file in raw["weight_map"].items() if file != "model-00002-of-00003.safetensors"}
    index.write_text(json.dumps({"weight_map": lost}))
    assert "missing: layers.0" in load_error(config_of(tmp_path))
    index.write_text(json.dumps(raw))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "must name files in its folder, not 'model-00002-of-00003.safetensors'" in load_error(config_of(tmp_path))


def test_unreachable_hub_id(monkeypatch):
    def raise_no_network(*_, **__):
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", raise_no_network)
    message = load_error(config_of("no-such-owner/no-such-encoder"))
    assert message.startswith("encoder: must be an existing folder or a reachable Hugging Face hub id")
    assert "'no-such-owner/no-such-encoder'" in message
    assert "no network" in message


def test_hub_id_downloads_what_is_read(folder, encoder, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = load_text_encoder(config_of("owner/encoder"))
    assert (found.name, found.fingerprint) == ("owner/encoder", encoder.fingerprint)
    assert {"config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"} <= set(asked)
    assert not any(pattern.startswith(("*", "/")) for pattern in asked)


def test_wordllama_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = load_error(config_of("wordllama"))
    assert message == "encoder: 'wordllama' needs the package of that name: pip install wordllama"
