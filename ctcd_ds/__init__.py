"""Co-training and co-distillation of language models on DeepSpeed (CTCD, arXiv 2311.02849)."""

__version__ = "0.1.0"
