"""Train a small AutoencoderKL on the emoji in eight styles, or on the embedded OpenMoji images.

    python scripts/train_vae.py --seconds 6000 --out vae [--resume-from vae]

Only this script needs torch and diffusers (the `test` extra). It writes `config.json` and float16 weights to the folder
`--out`, which are read without torch. It takes 1-2 hours on two CPU cores. Latents of one VAE cannot be used with
another: afterwards prepare the data and train the models again.

The kernels of convolutions are trained with Muon, everything else with AdamW: after 300 steps the loss is a fifth of
that of AdamW alone (development_log.md). The first part of the time sees crops, which are cheaper than whole images.
Chroma has more weight than luminance in the loss, which also has pooled errors at 2x and 4x: otherwise outlines are
learned first and red and green stay brown for a long time. Half of each batch has its colour channels permuted, so that
hues are not tied to shapes, and one picture of it is of one colour. A term of scale equivariance (EQ-VAE, Kouzelis et
al. 2025) asks that the mean of 2x2 latents decodes to the mean of 2x2 pixels: latents without fine noise are easier to
learn for a diffusion model. At the end each latent channel is scaled to a standard deviation of 1, in the weights.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from flowdit.data import emoji_styles, openmoji

SHAPES = {4: (8, [16, 48, 96]), 8: (16, [16, 32, 64, 96])}
"""Latent channels and the network's channels by stride."""
RGB_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
CHROMA_WEIGHT = torch.tensor([1.0, 1.5, 1.5]).view(1, 3, 1, 1)
EMA_DECAY = 0.998
MAX_SHIFT = 6
FIELDS_IN_BATCH = 2
CORNER_WEIGHT = 0.1
CROP = 32
FIELDS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "black": (0, 0, 0), "grey": (0.5, 0.5, 0.5)}


def new_vae(stride, latent_channels):
    channels = SHAPES[stride][1]
    architecture = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": 1,
        "latent_channels": latent_channels or SHAPES[stride][0],
        "norm_num_groups": 8,
        "sample_size": 64,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**architecture)


@torch.no_grad()
def keep_principal_channels(vae, smaller, tiles):
    """Load `smaller`, which has fewer latent channels, with `vae`: its first principal components become the channels."""
    count = smaller.decoder.conv_in.in_channels
    flat = latents_of(vae, tiles).permute(0, 2, 3, 1).flatten(0, 2)
    mean = flat.mean(0)
    basis = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors.flip(1)[:, :count]
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    (kernels, _), (bias, log_bias) = last.weight.chunk(2), last.bias.chunk(2)
    kernels = torch.einsum("oihw,oc->cihw", kernels, basis)
    layers = {
        "encoder.conv_out.weight": torch.cat([kernels, torch.zeros_like(kernels)]),
        "encoder.conv_out.bias": torch.cat([basis.T @ (bias - mean), log_bias.mean().expand(count)]),
        "decoder.conv_in.weight": torch.einsum("oihw,ic->ochw", first.weight, basis),
        "decoder.conv_in.bias": first.bias + torch.einsum("oihw,i->o", first.weight, mean),
    }
    smaller.load_state_dict({**vae.state_dict(), **layers})
    return smaller


def load_images(name):
    """Training images as uint8, (n, 3, 64, 64), and the held-out ones of each style."""
    if name == "openmoji":
        data = openmoji.load()
        tiles, styles = data.tiles, np.full(len(data.tiles), "openmoji")
        held_out = data.held_out
    else:
        pictures = emoji_styles.load_pictures()
        sheets = {style: emoji_styles.load_sheet(style) for style in emoji_styles.STYLES}
        tiles = np.stack([sheets[picture.style][picture.tile] for picture in pictures])
        styles = np.array([picture.style for picture in pictures])
        held_out = np.array([bool(picture.held_out) for picture in pictures])
    tiles = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()
    return tiles[~held_out], {style: tiles[held_out & (styles == style)] for style in dict.fromkeys(styles)}


def to_signed(tiles):
    return tiles.float() / 127.5 - 1


def augment(x, rng):
    """Flip and shift the batch at random; permute the colour channels of its second half; make the first of one colour."""
    if rng.random() < 0.5:
        x = x.flip(3)
    if rng.random() < 0.5:
        shifts = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)
        x = torch.roll(x, shifts.tolist(), (2, 3))
    colour = rng.choice([-1, 0, 1], size=3) if rng.random() < 0.5 else rng.uniform(-1, 1, size=3)
    x[:FIELDS_IN_BATCH] = torch.from_numpy(colour).float()[:, None, None]
    half = len(x) // 2
    return torch.cat([x[:half], x[half:][:, torch.from_numpy(rng.permutation(3))]])


def reconstruction_loss(decoded, x):
    """L1 and squared error in luminance and weighted chroma, and squared errors pooled at 2x and 4x."""
    error = torch.einsum("ij,bjhw->bihw", RGB_TO_YCC, decoded - x) * CHROMA_WEIGHT
    pooled = sum(F.avg_pool2d(error, k).pow(2).mean() for k in (2, 4))
    return error.abs().mean() + 2 * error.pow(2).mean() + 2 * pooled


def loss_of(vae, x, kl_weight, equivariance):
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    decoded = vae.decode(z).sample
    # Errors of fields of one colour are in their corners, too few pixels to count in a mean.
    corners = (decoded[:FIELDS_IN_BATCH] - x[:FIELDS_IN_BATCH]).abs().flatten(1).topk(64).values.mean()
    loss = reconstruction_loss(decoded, x) + kl_weight * kl + CORNER_WEIGHT * corners
    if equivariance:
        half = len(x) // 2
        decoded = vae.decode(F.avg_pool2d(z[:half], 2)).sample
        loss = loss + equivariance * reconstruction_loss(decoded, F.avg_pool2d(x[:half], 2))
    return loss


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for kernels of convolutions, each as a matrix (out, in x height x width)."""

    def __init__(self, parameters, learning_rate):
        super().__init__(parameters, {"lr": learning_rate})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for kernel in group["params"]:
                momentum = self.state[kernel].setdefault("momentum", torch.zeros_like(kernel))
                momentum.mul_(0.95).add_(kernel.grad)
                update = orthogonalised((kernel.grad + 0.95 * momentum).flatten(1))
                kernel.sub_(update.view(kernel.shape), alpha=0.2 * max(update.shape) ** 0.5 * group["lr"])


def orthogonalised(matrix):
    """Five Newton-Schulz steps towards the nearest matrix with orthogonal rows or columns."""
    is_tall = len(matrix) > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if is_tall else x


def make_optimizers(vae, learning_rate):
    outer = (vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in, vae.decoder.conv_out)
    others = {id(layer.weight) for layer in outer}
    kernels = [p for p in vae.parameters() if p.ndim == 4 and id(p) not in others]
    rest = [p for p in vae.parameters() if p.ndim != 4 or id(p) in others]
    return Muon(kernels, learning_rate), torch.optim.AdamW(rest, learning_rate, weight_decay=0, betas=(0.9, 0.99))


def train(vae, tiles, args):
    """Train `vae` in place for some time, with warm-up and linear decay; it ends with its averaged weights."""
    rng = np.random.default_rng(args.seed)
    optimizers = make_optimizers(vae, args.learning_rate)
    ema = {name: value.clone() for name, value in vae.state_dict().items()}
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / args.seconds) < 1:
        x = augment(to_signed(tiles[rng.integers(len(tiles), size=args.batch_size)]), rng)
        if share < args.crops:
            row, column = rng.integers(x.shape[2] - CROP + 1, size=2)
            x = x[:, :, row : row + CROP, column : column + CROP]
        loss = loss_of(vae, x.contiguous(memory_format=torch.channels_last), args.kl_weight, args.equivariance)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min(1, (step + 1) / 100) * max(0.02, 1 - share)
            optimizer.step()
        step += 1
        update_average(ema, vae, decay=min(EMA_DECAY, (1 + step) / (10 + step)))
        if step % 200 == 0:
            print(f"{share:.0%} of the time, step {step}, loss {loss.item():.4f}", flush=True)
    vae.load_state_dict(ema)


def update_average(ema, vae, decay):
    for name, value in vae.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


@torch.no_grad()
def reconstruct(vae, x):
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)]).clamp(-1, 1)


def psnr(vae, tiles):
    """PSNR of every image in dB."""
    x = to_signed(tiles)
    return -10 * ((reconstruct(vae, x) - x) / 2).pow(2).flatten(1).mean(1).log10()


def report(vae, held_out):
    """Print PSNR by style, and the largest error of fields of one colour (values in [0, 1])."""
    by_style = {style: psnr(vae, tiles) for style, tiles in held_out.items()}
    for style, values in by_style.items():
        print(f"{style}: {values.mean():.2f} dB of {len(values)} held-out images")
    print(f"mean: {torch.cat(list(by_style.values())).mean():.2f} dB", flush=True)
    for name, colour in FIELDS.items():
        x = (2 * torch.tensor(colour).float() - 1)[None, :, None, None].expand(1, 3, 64, 64)
        print(f"{name} field: error at most {(reconstruct(vae, x) - x).abs().max() / 2:.3f}")


@torch.no_grad()
def latents_of(vae, tiles):
    return torch.cat([vae.encode(to_signed(part)).latent_dist.mode() for part in tiles.split(64)])


@torch.no_grad()
def posterior_std(vae, tiles):
    return float(vae.encode(to_signed(tiles)).latent_dist.std.mean())


@torch.no_grad()
def normalise_channels(vae, tiles):
    """Scale each latent channel to a standard deviation of 1, in the encoder's last and the decoder's first layer."""
    scale = 1 / latents_of(vae, tiles).std((0, 2, 3))
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    mean, log_variance = slice(0, len(scale)), slice(len(scale), None)
    last.weight[mean] *= scale[:, None, None, None]
    last.bias[mean] *= scale
    last.bias[log_variance] += 2 * scale.log()
    first.weight /= scale[None, :, None, None]


def parse_args():
    parser = argparse.ArgumentParser(description="Train a small AutoencoderKL.")
    parser.add_argument("--data", choices=("emoji_styles", "openmoji"), default="emoji_styles")
    parser.add_argument("--seconds", type=float, default=6000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--stride", type=int, choices=SHAPES, default=4)
    parser.add_argument("--latent-channels", type=int, help="default: 8 with stride 4, 16 with stride 8")
    parser.add_argument("--kl-weight", type=float, default=3e-3, help="of the mean over latent values; default 3e-3")
    parser.add_argument("--crops", type=float, default=0.4, help="share of the time on crops of 32 x 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--equivariance", type=float, default=0.25, help="weight of the scale equivariance")
    parser.add_argument(
        "--resume-from",
        type=pathlib.Path,
        help="a folder written by this script; with fewer channels: principal components",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    tiles, held_out = load_images(args.data)
    again = args.resume_from
    vae = AutoencoderKL.from_pretrained(again) if again else new_vae(args.stride, args.latent_channels)
    channels = args.latent_channels
    if again and channels not in (None, vae.decoder.conv_in.in_channels):
        vae = keep_principal_channels(vae.float().eval(), new_vae(args.stride, channels), tiles[:: len(tiles) // 512])
    # float() as saved weights are float16, which cannot be trained.
    vae = vae.float().train()
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (its decorator hides the signature)
    train(vae, tiles, args)
    vae.eval()
    normalise_channels(vae, tiles)
    report(vae, held_out)
    latents = latents_of(vae, tiles)
    print(f"standard deviation of the posterior: {posterior_std(vae, tiles[:256]):.3f}")
    print("standard deviations of the channels:", *(f"{value:.2f}" for value in latents.std((0, 2, 3))))
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
