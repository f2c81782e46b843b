"""What makes inference fast: each puts itself in the model's place from outside."""
