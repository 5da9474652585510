"""Parts that are trained, a folder for each system: recipes, losses, labels and searches, and nothing of Ray."""
