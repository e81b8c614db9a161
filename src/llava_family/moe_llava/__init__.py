"""MoE-LLaVA (arXiv 2401.15947): sparse mixture of experts for large vision-language models."""
