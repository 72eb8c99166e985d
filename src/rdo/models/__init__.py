"""What is trained, or asked: policies, scorers, tokenizers, generation."""
