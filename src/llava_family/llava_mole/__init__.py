"""LLaVA-MoLE, arXiv 2401.16160: a text model adapted by a sparse mixture of LoRA experts in every layer."""
