"""Which synthetic images train the classifier: sample types, what is kept, where images come from."""
