"""What carries out a training step: plain PyTorch for one process, DeepSpeed for any number."""
