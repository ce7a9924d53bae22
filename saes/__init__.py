"""Sparse autoencoders on reasoning steps: step-level activation sets, training on SAELens, metrics, and interchange.

`collect` makes the activations, `train` the autoencoders (in SAELens's own format), `metrics` judges them beside
baselines, and `interop` loads anybody's autoencoder and checks the place it claims to belong to.
"""
