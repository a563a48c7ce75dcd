"""Latent data sets: record format, manifest, Grain loader, and preparation from images."""
