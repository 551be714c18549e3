"""What others use in our place: mixers to train in the same block, whole models to time."""
