"""The generator: noise, losses, network, training, sampling, and how good its images are."""
