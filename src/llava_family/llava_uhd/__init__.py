"""LLaVA-UHD (arXiv 2403.11703): a large multimodal model perceiving any aspect ratio and high-resolution images."""
