"""Classifiers: networks, losses and methods, training, accuracy, the geometry of their features, SAU."""
