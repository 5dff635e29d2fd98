"""Images and labels: the data sets, the long-tail protocol, augmentation."""
