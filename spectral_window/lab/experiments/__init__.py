"""The paper's experiments, each as published and well-posed."""
