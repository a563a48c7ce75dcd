"""The T5Gemma encoder compared with transformers on the same files, and errors for other files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from text_folders import ENCODER, random_tensors, write_t5gemma

from flowdit import sharding
from flowdit.models.t5gemma import load_t5gemma
from flowdit.models.text_encoder import encode_tokens

LENGTHS = (13, 7, 1)


def random_texts(lengths=LENGTHS, seed=1):
    """Ids and masks of ragged texts, padded on the right with tokens that are not padding."""
    ids = np.random.default_rng(seed).integers(4, ENCODER["vocab_size"], (len(lengths), max(lengths)), np.int32)
    return ids, np.arange(max(lengths))[None] < np.array(lengths)[:, None]


def reference_features(folder, ids, mask, **settings):
    torch = pytest.importorskip("torch", reason="needs torch")
    import transformers

    reference = transformers.T5GemmaEncoderModel.from_pretrained(
        folder, is_encoder_decoder=False, local_files_only=True, **settings
    )
    with torch.no_grad():
        out = reference.eval()(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    return out.last_hidden_state.float().numpy()


def features_of(folder, ids, mask, dtype="float32"):
    return np.asarray(encode_tokens(load_t5gemma(folder, dtype), ids, mask)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_t5gemma(tmp_path_factory.mktemp("t5gemma"))


@pytest.fixture
def own_folder(tmp_path):
    """A copy that a test may change."""
    return write_t5gemma(tmp_path / "t5gemma")


def test_every_feature_matches_transformers(folder):
    ids, mask = random_texts()
    expected, ours = reference_features(folder, ids, mask), features_of(folder, ids, mask)
    assert np.abs(ours - expected)[mask].max() <= 2e-5
    assert np.abs(expected[mask]).mean() > 0.3  # otherwise the bound would mean little


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_logit_softcapping": None},
        {"attn_logit_softcapping": 1.0},
        {"sliding_window": 5},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"query_pre_attn_scalar": 100},
        {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"rms_norm_eps": 0.1},
        {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 8, "num_hidden_layers": 2, "layer_types": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_each_setting_is_followed_as_in_transformers(folder, tmp_path, settings):
    ids, mask = random_texts()
    other = write_t5gemma(tmp_path / "other", **settings)
    expected, ours = reference_features(other, ids, mask), features_of(other, ids, mask)
    assert np.abs(ours - expected)[mask].max() <= 2e-5
    assert np.abs(ours - features_of(folder, ids, mask))[mask].max() > 1e-3  # the setting matters


def test_bfloat16_is_close_to_float32_and_to_transformers(folder):
    ids, mask = random_texts()
    exact, rough = features_of(folder, ids, mask), features_of(folder, ids, mask, "bfloat16")
    theirs = reference_features(folder, ids, mask, dtype="bfloat16")
    error = np.abs(rough - exact)[mask].mean()
    assert 0 < error < 0.02 * np.abs(exact[mask]).mean()
    assert error <= 1.1 * np.abs(theirs - exact)[mask].mean()
    assert encode_tokens(load_t5gemma(folder, "bfloat16"), ids, mask).dtype == jnp.bfloat16


def test_padding_does_not_change_valid_features(folder):
    ids, mask = random_texts((7,))
    wide_ids, wide_mask = np.pad(ids, ((0, 0), (0, 9)), constant_values=5), np.pad(mask, ((0, 0), (0, 9)))
    np.testing.assert_allclose(
        features_of(folder, wide_ids, wide_mask)[:, :7], features_of(folder, ids, mask), atol=1e-5
    )


def test_text_without_tokens_is_not_nan(folder):
    ids, mask = random_texts()
    assert np.isfinite(features_of(folder, ids, np.zeros_like(mask))).all()


def save_with_transformers(kind, folder, **options):
    """A model saved by transformers, with norms that are not 1."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.T5GemmaConfig(encoder=dict(ENCODER), decoder=dict(ENCODER))
    config.is_encoder_decoder = kind != "T5GemmaEncoderModel"
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)


@pytest.mark.parametrize("kind", ["T5GemmaForConditionalGeneration", "T5GemmaModel", "T5GemmaEncoderModel"])
def test_checkpoints_that_transformers_saves_are_read(tmp_path, kind):
    save_with_transformers(kind, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    ids, mask = random_texts()
    expected, ours = reference_features(tmp_path, ids, mask), features_of(tmp_path, ids, mask)
    assert np.abs(ours - expected)[mask].max() <= 2e-5


@pytest.mark.parametrize("prefix", ["encoder.", ""], ids=["encoder", "bare"])
def test_key_prefix_and_shards_do_not_matter(folder, tmp_path, prefix):
    whole = load_t5gemma(folder, "float32")
    other = load_t5gemma(write_t5gemma(tmp_path, prefix=prefix, num_shards=3), "float32")
    assert whole.fingerprint == other.fingerprint
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, other))


@pytest.mark.parametrize("content", [None, b"not safetensors"], ids=["missing", "damaged"])
def test_decoder_is_never_read(folder, tmp_path, content):
    write_t5gemma(tmp_path, num_shards=3)
    decoder = tmp_path / "model-00003-of-00003.safetensors"
    decoder.unlink() if content is None else decoder.write_bytes(content)
    assert load_t5gemma(tmp_path, "float32").fingerprint == load_t5gemma(folder, "float32").fingerprint


def test_only_the_encoders_tensors_of_a_file_are_read(own_folder, monkeypatch):
    read = []

    class Recorder:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):  # only for the shape in the header
            return self.file.get_slice(key)

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    original = safetensors.safe_open
    monkeypatch.setattr("safetensors.safe_open", Recorder)
    load_t5gemma(own_folder, "float32")
    assert sorted(read) == sorted("model.encoder." + name for name in random_tensors(ENCODER, 0))


def test_parameters_are_laid_out_on_the_mesh(folder):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))
    ids, mask = random_texts()
    network = load_t5gemma(folder, "float32", mesh)
    expected = sharding.parameter_shardings(mesh, network)
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted, network, expected))
    np.testing.assert_allclose(encode_tokens(network, ids, mask), features_of(folder, ids, mask), atol=1e-5)


def test_fingerprint_distinguishes_weights_and_settings(own_folder, tmp_path):
    tuned = safetensors.numpy.load_file(own_folder / "model.safetensors")
    tuned = {key: tensor + (1e-3 if "layers.1.mlp.up" in key else 0) for key, tensor in tuned.items()}
    fingerprints = [load_t5gemma(own_folder, dtype).fingerprint for dtype in ("float32", "bfloat16")]
    safetensors.numpy.save_file(tuned, own_folder / "model.safetensors")
    fingerprints.append(load_t5gemma(own_folder, "float32").fingerprint)
    fingerprints.append(load_t5gemma(write_t5gemma(tmp_path / "window", sliding_window=3), "float32").fingerprint)
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in fingerprints)


def load_error(folder):
    """The one-line error of `load_t5gemma`."""
    with pytest.raises(ValueError) as caught:
        load_t5gemma(folder, "float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_architecture_says_what_was_found_and_expected(own_folder):
    (own_folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    expected = f"{own_folder}: must be a T5Gemma checkpoint (model_type t5gemma), found model_type 'bert'"
    assert load_error(own_folder) == expected


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden_activation", "silu", ": must be 'gelu_pytorch_tanh', got 'silu'"),
        ("attention_bias", True, ": must be False, got True"),
        ("rope_scaling", {"factor": 2.0}, ": must be null, got {'factor': 2.0}"),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "yarn"}, ".rope_type: must be 'default', got 'yarn'"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, ".full_attention: is not a known field"),
        ("rope_theta", -1.0, ": must be greater than 0, got -1.0"),
        ("hidden_size", "48", ": must be a valid integer, got '48'"),
        ("vocab_size", 0, ": must be greater than or equal to 1, got 0"),
        ("sliding_window", None, ": must be a valid integer, got None"),
        ("num_key_value_heads", 3, ": must be a divisor of num_attention_heads=4, got 3"),
        ("head_dim", 15, ": must be even, got 15"),
        ("query_pre_attn_scalar", 0, ": must be greater than 0, got 0"),
        ("attn_logit_softcapping", -3.0, ": must be greater than 0, got -3.0"),
        ("rms_norm_eps", float("nan"), ": must be a finite number, got nan"),
        ("layer_types", ["full_attention"], ": must be a list of 3, got ['full_attention']"),
        ("layer_types", ["full_attention", "chunked"], "[1]: must be 'sliding_attention' or 'full_attention', got "),
        ("pad_token_id", 320, ": must be a token below vocab_size=320, got 320"),
    ],
)
def test_unsupported_settings_are_refused_by_field_and_value(own_folder, field, value, told):
    encoder = dict(ENCODER) | {field: value}
    if field == "rope_theta":
        del encoder["rope_parameters"]
    (own_folder / "config.json").write_text(json.dumps({"model_type": "t5gemma", "encoder": encoder}))
    assert load_error(own_folder).startswith(f"{own_folder}: {field}{told}")


def test_older_configs_have_the_rotary_base_outside(own_folder, folder):
    encoder = {key: value for key, value in ENCODER.items() if key != "rope_parameters"}
    (own_folder / "config.json").write_text(
        json.dumps({"model_type": "t5gemma", "encoder": encoder | {"rope_theta": 50.0, "rope_scaling": None}})
    )
    assert load_t5gemma(own_folder, "float32").config.rope_theta == 50.0
    assert load_t5gemma(folder, "float32").config.rope_theta == 10000.0


def test_config_without_encoder_is_refused(own_folder):
    (own_folder / "config.json").write_text(json.dumps({"model_type": "t5gemma"}))
    assert load_error(own_folder).startswith(f"{own_folder}: encoder: must be an object")


def test_missing_and_misshapen_tensors_are_listed_by_key(own_folder):
    file = own_folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["model.encoder.layers.1.mlp.up_proj.weight"], tensors["model.encoder.norm.weight"]
    tensors["model.encoder.layers.2.self_attn.q_proj.weight"] = np.zeros((4, 4), np.float32)
    tensors["model.encoder.layers.3.mlp.up_proj.weight"] = np.zeros((4, 4), np.float32)
    safetensors.numpy.save_file(tensors, file)
    message = load_error(own_folder)
    assert "2 missing: layers.1.mlp.up_proj.weight, norm.weight" in message
    assert "1 unexpected: layers.3.mlp.up_proj.weight" in message
    assert "1 different: layers.2.self_attn.q_proj.weight float[4, 4] for float[64, 48]" in message


def test_folder_without_files_is_named(own_folder):
    (own_folder / "model.safetensors").unlink()
    assert load_error(own_folder).startswith(f"{own_folder}: must hold model.safetensors")
    (own_folder / "config.json").unlink()
    assert load_error(own_folder).startswith(str(own_folder / "config.json"))


def test_truncated_weights_are_named(own_folder):
    file = own_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert load_error(own_folder).startswith(f"{file}: not a readable safetensors file")
