"""A common interface of frozen text encoders: from texts to token ids on the host, to features on the devices.

There are two: T5Gemma, from a Hugging Face folder, and `wordllama`, 256-wide static token embeddings from the wheel of
that package, which need no further download.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from flowdit import hashing, sharding
from flowdit.errors import first_line
from flowdit.fields import FieldError, require, require_choice
from flowdit.models import pretrained
from flowdit.models.t5gemma import WEIGHTS_STEM, load_t5gemma

WORDLLAMA = "wordllama"
DTYPES = ("bfloat16", "float32")
"""Not float16: activations of the T5 family overflow it."""
WORDLLAMA_WIDTH = 256
T5GEMMA_WIDTH = 2304
TOKENIZER_FILE = "tokenizer.json"
# Each length and number of texts is compiled separately, so there are few of both.
SHORTEST = 16
MAX_BATCH = 32

Network = Callable[[Int[Array, " length"], Bool[Array, " length"]], Float[Array, "length width"]]


@dataclasses.dataclass
class TextConfig:
    """Settings of the frozen text encoder.

    Attributes:
        encoder: `wordllama`, a folder with a T5Gemma model, or its Hugging Face hub id.
        max_length: tokens to which captions are cut, special tokens included; 120 in PixArt-alpha, 300 in PixArt-sigma.
        dtype: dtype of its weights and features, `bfloat16` or `float32`.
    """

    encoder: str = "google/t5gemma-2b-2b-ul2"
    max_length: int = 120
    dtype: str = "bfloat16"

    def check(self) -> None:
        """Raise `FieldError` naming the first invalid field."""
        named = bool(self.encoder.strip())
        require("encoder", self.encoder, named, "must be 'wordllama', a folder or a hub id")
        require("max_length", self.max_length, self.max_length >= 1, "must be at least 1")
        require_choice("dtype", self.dtype, DTYPES)


class Tokens(NamedTuple):
    """Texts as token ids, padded on the right. `truncated`: the text had more tokens than the length."""

    ids: Int[np.ndarray, "n length"]
    mask: Bool[np.ndarray, "n length"]
    truncated: Bool[np.ndarray, " n"]


class TextFeatures(NamedTuple):
    """Features of texts. They are meaningless where `mask` is False."""

    features: Float[np.ndarray, "n length width"]
    mask: Bool[np.ndarray, "n length"]
    truncated: Bool[np.ndarray, " n"]


class TokenTable(eqx.Module):
    """Static embeddings: a token has the same features at every position."""

    weight: Float[Array, "vocabulary width"]

    def __call__(self, ids: Int[Array, " length"], mask: Bool[Array, " length"]) -> Float[Array, "length width"]:
        return self.weight[ids]


@eqx.filter_jit
def encode_tokens(
    network: Network, ids: Int[Array, "n length"], mask: Bool[Array, "n length"]
) -> Float[Array, "n length width"]:
    """Apply `network` to a batch; jitted, also within another jit such as the training step's."""
    return jax.vmap(network)(ids, mask)


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """A frozen text encoder.

    `fingerprint` is 16 hex digits over weights, configuration and tokenizer, and identifies the features. `network`
    maps the tokens of one text, (length,) ids and mask, to features (length, width) in `dtype`; callers `vmap`.
    """

    name: str
    fingerprint: str
    dtype: str
    max_length: int
    width: int
    network: Network
    tokenizer: Tokenizer
    add_special_tokens: bool
    pad_id: int

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Token ids padded to `length` (default `max_length`); longer texts are cut, special tokens kept.

        An empty or blank text has no tokens, not even special ones. The method is thread-safe.
        """
        length = self.max_length if length is None else length
        room = length - (self.tokenizer.num_special_tokens_to_add(False) if self.add_special_tokens else 0)
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        mask, truncated = np.zeros((len(texts), length), bool), np.zeros(len(texts), bool)
        for row, content in enumerate(self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            if texts[row].strip():
                truncated[row] = len(content) > room
                content.truncate(room)
                whole = self.tokenizer.post_process(content, add_special_tokens=self.add_special_tokens)
                ids[row, : len(whole)] = whole.ids
                mask[row, : len(whole)] = True
        return Tokens(ids, mask, truncated)

    def encode(self, texts: Sequence[str], length: int | None = None) -> TextFeatures:
        """Features of `texts` in host memory, padded to `length`, by default to one of a few lengths that fits the
        longest.

        Each length and number of texts is compiled once, and the features of a text do not depend on the other texts.
        """
        tokens = self.tokenize(texts)
        length = length or self._padded_length(int(tokens.mask.sum(1).max(initial=0)))
        ids, mask = tokens.ids[:, :length], tokens.mask[:, :length]
        # A power of two, so that few sizes are compiled and a single prompt does not need a full batch.
        batch = min(MAX_BATCH, 1 << max(0, len(texts) - 1).bit_length())
        features = np.empty((len(texts), length, self.width), jnp.dtype(self.dtype))
        for start in range(0, len(texts), batch):
            rows = slice(start, start + batch)
            features[rows] = self._encode_rows(ids[rows], mask[rows], batch)
        return TextFeatures(features, mask, tokens.truncated)

    def _padded_length(self, longest: int) -> int:
        length = SHORTEST
        while length < longest:
            length *= 2
        return min(length, self.max_length)

    def _encode_rows(
        self, ids: Int[np.ndarray, "n length"], mask: Bool[np.ndarray, "n length"], batch: int
    ) -> Float[np.ndarray, "n length width"]:
        padding = ((0, batch - len(ids)), (0, 0))
        padded = (jnp.asarray(np.pad(rows, padding)) for rows in (ids, mask))
        return np.asarray(encode_tokens(self.network, *padded))[: len(ids)]


def usual_width(encoder: str) -> int:
    """Width of the features of an encoder that is not loaded, of T5Gemma-2B if it is not `wordllama`."""
    return WORDLLAMA_WIDTH if encoder == WORDLLAMA else T5GEMMA_WIDTH


def load_text_encoder(config: TextConfig, mesh: Mesh | None = None) -> TextEncoder:
    """Read tokenizer and weights of `config.encoder`; with `mesh`, the weights are laid out on it.

    Raises:
        FieldError: naming `encoder` and the invalid file or tensors, or another field of `config`.
    """
    config.check()
    if config.encoder == WORDLLAMA:
        return _load_wordllama(config, mesh)
    folder = pretrained.find_folder("encoder", config.encoder, stem=WEIGHTS_STEM, also=[TOKENIZER_FILE])
    try:
        encoder = _load_t5gemma(config, folder, mesh)
    except ValueError as error:
        raise FieldError("encoder", str(error)) from error
    specials = encoder.tokenizer.num_special_tokens_to_add(False)
    rule = f"must be above the {specials} special tokens"
    require("max_length", config.max_length, config.max_length > specials, rule)
    return encoder


def _load_t5gemma(config: TextConfig, folder: Path, mesh: Mesh | None) -> TextEncoder:
    # Before the weights, which are slow to read: most errors of a folder are found here.
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    network = load_t5gemma(folder, config.dtype, mesh)
    largest = max([*tokenizer.get_vocab().values(), *tokenizer.encode("a").ids], default=0)
    if largest >= network.config.vocab_size:
        raise ValueError(
            f"{folder}: {TOKENIZER_FILE} must have ids below vocab_size={network.config.vocab_size}, not {largest}"
        )
    identity = f"{network.fingerprint} {hashing.files_fingerprint(folder / TOKENIZER_FILE)}"
    return TextEncoder(
        name=config.encoder,
        fingerprint=hashing.fingerprint(identity),
        dtype=config.dtype,
        max_length=config.max_length,
        width=network.config.hidden_size,
        network=network,
        tokenizer=tokenizer,
        add_special_tokens=True,
        pad_id=network.config.pad_token_id,
    )


def _load_wordllama(config: TextConfig, mesh: Mesh | None) -> TextEncoder:
    # Located but not imported: the package's code is not needed, and has further dependencies.
    spec = importlib.util.find_spec(WORDLLAMA)
    if spec is None or not spec.submodule_search_locations:
        raise FieldError("encoder", "'wordllama' needs the package of that name: pip install wordllama")
    folder = Path(next(iter(spec.submodule_search_locations)))
    tokenizer_file = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    weights = folder / "weights" / "l2_supercat_256.safetensors"
    tokenizer = read_tokenizer(tokenizer_file)
    # Not rescaled, as their standard deviation is 0.9.
    tensors = {key.removeprefix("embedding."): tensor for key, tensor in pretrained.read_tensors([weights]).items()}
    shapes = eqx.filter_eval_shape(lambda: TokenTable(jnp.zeros((tokenizer.get_vocab_size(), 256))))
    shardings = None if mesh is None else sharding.parameter_shardings(mesh, shapes)
    network = pretrained.fill(shapes, tensors, config.dtype, source=weights, shardings=shardings)
    return TextEncoder(
        name=WORDLLAMA,
        fingerprint=hashing.files_fingerprint(weights, tokenizer_file),
        dtype=config.dtype,
        max_length=config.max_length,
        width=network.weight.shape[1],
        network=network,
        tokenizer=tokenizer,
        add_special_tokens=False,  # its "<s>" is meaningless without a network
        pad_id=0,
    )


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a `tokenizer.json`, its padding and truncation switched off. Raises `ValueError` naming a file that is no such."""
    if not file.is_file():
        raise ValueError(f"{file.parent}: must hold {file.name}, as transformers saves a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode("a")  # where special tokens that the file does not define are found
    except BaseException as error:  # the library raises nothing more specific, and its panics are no `Exception`
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file}: not a readable tokenizer ({first_line(error)})") from error
    # Override the file: Gemma's pads on the left.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
