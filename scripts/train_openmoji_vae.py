"""Train the embedded AutoencoderKL on the embedded OpenMoji images.

    python scripts/train_openmoji_vae.py --seconds 6000 --out flowdit/assets/vae [--resume-from flowdit/assets/vae]

Only this script needs torch and diffusers (the `test` extra). It writes `config.json` and float16 weights to the folder
`--out`, which are read without torch. It takes 1-2 hours on two CPU cores. Latents of one VAE cannot be used with
another: afterwards prepare the data and train the models again.

Stride 8, 16 latent channels, 1.67 M parameters. Chroma has three times the weight of luminance in the loss, which also
has pooled errors at 2x and 4x: otherwise outlines are learned first and red and green stay brown for a long time. Half
of each batch has its colour channels permuted, so that hues are not tied to shapes.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from flowdit.data import openmoji
from flowdit.models.vae import EMBEDDED

ARCHITECTURE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
RGB_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
CHROMA_WEIGHT = torch.tensor([1.0, 3.0, 3.0]).view(1, 3, 1, 1)
KL_WEIGHT = 2e-5
EMA_DECAY = 0.998
MAX_SHIFT = 6


def load_images():
    """Training and held-out images as uint8, (n, 3, 64, 64)."""
    data = openmoji.load()
    tiles = torch.tensor(data.tiles).permute(0, 3, 1, 2).contiguous()
    held_out = torch.tensor(data.held_out)
    return tiles[~held_out], tiles[held_out]


def to_signed(tiles):
    return tiles.float() / 127.5 - 1


def augment(x, rng):
    """Flip and shift the batch at random; permute the colour channels of its second half."""
    if rng.random() < 0.5:
        x = x.flip(3)
    if rng.random() < 0.5:
        shifts = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)
        x = torch.roll(x, shifts.tolist(), (2, 3))
    half = len(x) // 2
    return torch.cat([x[:half], x[half:][:, torch.from_numpy(rng.permutation(3))]])


def loss_of(vae, x):
    """L1 and squared error in luminance and weighted chroma, squared errors pooled at 2x and 4x, and a small KL term."""
    posterior = vae.encode(x).latent_dist
    error = torch.einsum("ij,bjhw->bihw", RGB_TO_YCC, vae.decode(posterior.sample()).sample - x) * CHROMA_WEIGHT
    pooled = sum(F.avg_pool2d(error, k).pow(2).mean() for k in (2, 4))
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 2 * error.pow(2).mean() + 2 * pooled + KL_WEIGHT * kl


def train(vae, tiles, *, seconds, batch_size, learning_rate):
    """Train `vae` in place for some time, with warm-up and linear decay; it ends with its averaged weights."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0, betas=(0.9, 0.99))
    ema = {name: value.clone() for name, value in vae.state_dict().items()}
    start, step = time.monotonic(), 0
    while (spent := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 100) * max(0.02, 1 - spent / seconds)
        x = augment(to_signed(tiles[rng.integers(len(tiles), size=batch_size)]), rng)
        loss = loss_of(vae, x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_average(ema, vae, decay=min(EMA_DECAY, (1 + step) / (10 + step)))
        if step % 200 == 0:
            print(f"{spent:.0f} s, step {step}, loss {loss.item():.4f}", flush=True)
    vae.load_state_dict(ema)


def update_average(ema, vae, decay):
    for name, value in vae.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


@torch.no_grad()
def evaluate(vae, x):
    """Mean PSNR over images (dB) and root-mean-square chroma error (channels have range 1)."""
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)]).clamp(-1, 1)
    mse = ((y - x) / 2).pow(2).flatten(1).mean(1)
    chroma = torch.einsum("ij,bjhw->bihw", RGB_TO_YCC, y - x)[:, 1:] / 2
    return float((-10 * mse.log10()).mean()), float(chroma.pow(2).mean().sqrt())


@torch.no_grad()
def measure_latents(vae, tiles):
    """The shift and scale that normalise the latents of `tiles` to mean 0 and standard deviation 1."""
    latents = torch.cat([vae.encode(to_signed(part)).latent_dist.mode() for part in tiles.split(64)])
    return float(latents.mean()), float(1 / latents.std())


def parse_args():
    parser = argparse.ArgumentParser(description="Train the embedded VAE.")
    parser.add_argument("--seconds", type=float, default=6000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--resume-from", type=pathlib.Path, help="a folder written by this script")
    parser.add_argument("--out", type=pathlib.Path, default=EMBEDDED["openmoji"])
    return parser.parse_args()


def main():
    args = parse_args()
    torch.manual_seed(0)
    tiles, held_out = load_images()
    vae = AutoencoderKL.from_pretrained(args.resume_from) if args.resume_from else AutoencoderKL(**ARCHITECTURE)
    # float() as saved weights are float16, which cannot be trained.
    vae = vae.float().train()
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (its decorator hides the signature)
    train(vae, tiles, seconds=args.seconds, batch_size=args.batch_size, learning_rate=args.learning_rate)
    vae.eval()
    print("held-out PSNR {:.2f} dB, chroma error {:.4f} rms".format(*evaluate(vae, to_signed(held_out))))
    shift_factor, scaling_factor = measure_latents(vae, tiles)
    vae.register_to_config(shift_factor=shift_factor, scaling_factor=scaling_factor)
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
