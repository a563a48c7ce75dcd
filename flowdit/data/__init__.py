"""Latent data sets: record format, manifest, Grain loader, and the command that makes them from images."""
