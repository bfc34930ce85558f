"""Networks: a timm ViT with taps, the DPT head, both together, and their weight files."""
